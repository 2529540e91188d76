// SPDX-License-Identifier: Apache-2.0
// Layers that are split over GPUs by heads, by tokens or both are cut as on one: with NCCL, a
// thread for each GPU. Returns 77 where there is none.
#include <algorithm>
#include <cstdlib>
#include <thread>

#include "comparison.hpp"
#include "cuda_device.cuh"
#include "nccl_group.cuh"

using namespace distributed;

namespace {

bool run_rank(ncclComm_t all, int number, blackboard& board, const options& opts) {
  try {
    const cuda_device device(number);
    const nccl_world world(all, device.backend.stream, board);
    return comparison(device, world, opts).run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "distributed_nccl: rank %d: %s\n", number, error.what());
    std::exit(1);  // others would wait for it
  }
}

}  // namespace

int main(int argc, char** argv) {
  int devices = 0, exit_code = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess) devices = 0;
  const auto opts = parse(argc, argv, std::max(devices, 1), true, exit_code);
  if (!opts) return exit_code;
  if (devices == 0) {
    std::puts("no CUDA device: nothing was compared");
    return 77;
  }
  std::vector<ncclComm_t> all(static_cast<std::size_t>(devices));
  if (const ncclResult_t made = ncclCommInitAll(all.data(), devices, nullptr);
      made != ncclSuccess) {
    std::fprintf(stderr, "distributed_nccl: %s\n", ncclGetErrorString(made));
    return 1;
  }
  blackboard board(devices);
  std::vector<std::thread> others;
  for (int number = 1; number < devices; ++number) {
    others.emplace_back(
        [&, number] { run_rank(all[static_cast<std::size_t>(number)], number, board, *opts); });
  }
  const bool equal = run_rank(all[0], 0, board, *opts);
  for (std::thread& other : others) other.join();
  return equal ? 0 : 1;
}
