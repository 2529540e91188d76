// SPDX-License-Identifier: Apache-2.0
// For ThreadSanitizer: `races` is silent, `races sync` and `races blocks` must each be reported.
#include <string_view>
#include <vector>

#include "emulated_backend.hpp"

namespace {

using emulation::index_t;
using refreekv::cuda_detail::block_threads;

/// Hands values to another thread of the warp through shared memory, and between two exchanges of
/// the warp, which order no memory; then writes them to a place of its own, or of all blocks.
struct shift_body {
  struct shared {
    float values[block_threads];
  };
  float* out;
  bool synchronised;
  index_t item_stride;

  template <refreekv::cuda_detail::thread_block Block>
  void operator()(Block& block, shared& s, index_t item) const noexcept {
    const int rank = block.rank();
    s.values[rank] = block.warp_prefix_sum(1.0f);
    if (synchronised) block.sync();
    const float sum = block.warp_reduce(s.values[rank ^ 1], refreekv::cuda_detail::plus{});
    out[item * item_stride + rank] = sum;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const std::string_view planted = argc > 1 ? argv[1] : "";
  std::vector<float> out(4 * block_threads);
  for (const unsigned order_seed : {0u, 1u}) {
    const shift_body body{out.data(), planted != "sync", planted != "blocks" ? block_threads : 0};
    if (run_blocks(emulation::emulated_backend{order_seed}, 4, body) != refreekv::status::ok) {
      return 1;
    }
  }
  return out[0] > 0 ? 0 : 1;
}
