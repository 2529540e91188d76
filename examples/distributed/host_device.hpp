// SPDX-License-Identifier: Apache-2.0
// A rank's work on the CPU, for rank_layer.
#pragma once

#include <refreekv/cpu/backend.hpp>
#include <vector>

namespace distributed {

struct host_device {
  using memory = refreekv::host_memory;

  template <class T>
  class array {
   public:
    explicit array(std::vector<T> values) : values_(std::move(values)) {}
    T* data() { return values_.data(); }
    const T* data() const { return values_.data(); }
    const std::vector<T>& download() const { return values_; }

   private:
    std::vector<T> values_;
  };

  refreekv::cpu_backend<> backend;

  void wait() const {}
};

}  // namespace distributed
