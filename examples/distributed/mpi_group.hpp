// SPDX-License-Identifier: Apache-2.0
// Processes that all-reduce over MPI.
#pragma once

#define OMPI_SKIP_MPICXX 1
#include <mpi.h>

#include <cstdint>
#include <limits>
#include <refreekv/core/config.hpp>
#include <refreekv/core/status.hpp>
#include <utility>
#include <vector>

namespace distributed {

using refreekv::index_t;

// MPI, from the first line of main to the last.
struct mpi_session {
  mpi_session(int& argc, char**& argv) { MPI_Init(&argc, &argv); }
  ~mpi_session() { MPI_Finalize(); }
  mpi_session(const mpi_session&) = delete;
  mpi_session& operator=(const mpi_session&) = delete;
};

class mpi_group {
 public:
  // All processes.
  mpi_group() { MPI_Comm_dup(MPI_COMM_WORLD, &all_); }
  ~mpi_group() {
    if (all_ != MPI_COMM_NULL) MPI_Comm_free(&all_);
  }
  mpi_group(mpi_group&& other) noexcept : all_(std::exchange(other.all_, MPI_COMM_NULL)) {}
  mpi_group& operator=(mpi_group&&) = delete;

  index_t rank() const {
    int rank;
    MPI_Comm_rank(all_, &rank);
    return rank;
  }
  index_t size() const {
    int size;
    MPI_Comm_size(all_, &size);
    return size;
  }
  // The processes that say the same.
  mpi_group split(index_t number) const {
    MPI_Comm part;
    MPI_Comm_split(all_, static_cast<int>(number), static_cast<int>(rank()), &part);
    return mpi_group(part);
  }

  refreekv::status sum(double* values, index_t count) const {
    return sum(values, count, MPI_DOUBLE);
  }
  refreekv::status sum(std::uint32_t* values, index_t count) const {
    return sum(values, count, MPI_UINT32_T);
  }

  // Everybody's, by rank.
  template <class T>
  std::vector<T> gather(const T& local) const {
    static_assert(std::is_trivially_copyable_v<T>);
    std::vector<T> all(static_cast<std::size_t>(size()));
    MPI_Allgather(&local, sizeof local, MPI_BYTE, all.data(), sizeof local, MPI_BYTE, all_);
    return all;
  }

 private:
  explicit mpi_group(MPI_Comm all) : all_(all) {}

  refreekv::status sum(void* values, index_t count, MPI_Datatype type) const {
    if (count > std::numeric_limits<int>::max()) return refreekv::status::device_error;
    return MPI_Allreduce(MPI_IN_PLACE, values, static_cast<int>(count), type, MPI_SUM, all_) ==
                   MPI_SUCCESS
               ? refreekv::status::ok
               : refreekv::status::device_error;
  }

  MPI_Comm all_ = MPI_COMM_NULL;
};

}  // namespace distributed
