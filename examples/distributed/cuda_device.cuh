// SPDX-License-Identifier: Apache-2.0
// A rank's work on a GPU, for rank_layer.
#pragma once

#include <cuda_runtime.h>

#include <refreekv/cuda/backend.cuh>
#include <stdexcept>
#include <vector>

namespace distributed {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

class cuda_device {
 public:
  using memory = refreekv::device_memory;

  // Of one thread, until it ends.
  explicit cuda_device(int number) {
    check(cudaSetDevice(number));
    check(cudaStreamCreate(&backend.stream));
  }
  ~cuda_device() { cudaStreamDestroy(backend.stream); }
  cuda_device(const cuda_device&) = delete;
  cuda_device& operator=(const cuda_device&) = delete;

  template <class T>
  class array {
   public:
    explicit array(const std::vector<T>& values) : count_(values.size()) {
      check(cudaMalloc(&data_, count_ * sizeof(T) + 1));
      check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~array() { cudaFree(data_); }
    array(const array&) = delete;
    array& operator=(const array&) = delete;

    T* data() const { return data_; }
    std::vector<T> download() const {
      std::vector<T> values(count_);
      check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
      return values;
    }

   private:
    std::size_t count_;
    T* data_ = nullptr;
  };

  void wait() const { check(cudaStreamSynchronize(backend.stream)); }

  refreekv::cuda_backend backend;
};

}  // namespace distributed
