// SPDX-License-Identifier: Apache-2.0
// GPUs of one process that all-reduce over NCCL, in the order of a stream.
#pragma once

#include <nccl.h>

#include <barrier>
#include <cstdint>
#include <cstring>
#include <refreekv/core/config.hpp>
#include <refreekv/core/status.hpp>
#include <stdexcept>
#include <utility>
#include <vector>

namespace distributed {

using refreekv::index_t;

inline void check(ncclResult_t result) {
  if (result != ncclSuccess) throw std::runtime_error(ncclGetErrorString(result));
}

// The two calls that join a rank to others: neither waits.
class nccl_group {
 public:
  // all: the rank's communicator, which becomes the group's; stream: the backend's.
  nccl_group(ncclComm_t all, cudaStream_t stream) : all_(all), stream_(stream) {}
  ~nccl_group() {
    if (all_ != nullptr) ncclCommDestroy(all_);
  }
  nccl_group(nccl_group&& other) noexcept
      : all_(std::exchange(other.all_, nullptr)), stream_(other.stream_) {}
  nccl_group& operator=(nccl_group&&) = delete;

  index_t rank() const {
    int rank;
    check(ncclCommUserRank(all_, &rank));
    return rank;
  }
  index_t size() const {
    int size;
    check(ncclCommCount(all_, &size));
    return size;
  }
  // The ranks that say the same.
  nccl_group split(index_t number) const {
    ncclComm_t part = nullptr;
    check(ncclCommSplit(all_, static_cast<int>(number), static_cast<int>(rank()), &part, nullptr));
    return {part, stream_};
  }

  refreekv::status sum(double* values, index_t count) const {
    return sum(values, count, ncclFloat64);
  }
  refreekv::status sum(std::uint32_t* values, index_t count) const {
    return sum(values, count, ncclUint32);
  }

 private:
  refreekv::status sum(void* values, index_t count, ncclDataType_t type) const {
    return ncclAllReduce(values, values, static_cast<std::size_t>(count), type, ncclSum, all_,
                         stream_) == ncclSuccess
               ? refreekv::status::ok
               : refreekv::status::device_error;
  }

  ncclComm_t all_;
  cudaStream_t stream_;
};

// Where the process's ranks, a thread each, leave something for each other.
class blackboard {
 public:
  explicit blackboard(index_t ranks)
      : barrier_(static_cast<std::ptrdiff_t>(ranks)), written_(static_cast<std::size_t>(ranks)) {}

  // Everybody's, by rank.
  template <class T>
  std::vector<T> gather(index_t rank, const T& local) {
    static_assert(std::is_trivially_copyable_v<T>);
    written_[static_cast<std::size_t>(rank)] = &local;
    barrier_.arrive_and_wait();
    std::vector<T> all;
    for (const void* other : written_) all.push_back(*static_cast<const T*>(other));
    barrier_.arrive_and_wait();
    return all;
  }

 private:
  std::barrier<> barrier_;
  std::vector<const void*> written_;
};

// All ranks.
class nccl_world : public nccl_group {
 public:
  nccl_world(ncclComm_t all, cudaStream_t stream, blackboard& board)
      : nccl_group(all, stream), board_(board) {}

  template <class T>
  std::vector<T> gather(const T& local) const {
    return board_.gather(rank(), local);
  }

 private:
  blackboard& board_;
};

}  // namespace distributed
