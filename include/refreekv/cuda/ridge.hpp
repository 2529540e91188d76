// SPDX-License-Identifier: Apache-2.0
// The ridge regression of a KV head's rows on a device: by how much a key has to change from how
// much too large its logits are.
#pragma once

#include "refreekv/cuda/bare_logits.hpp"
#include "refreekv/cuda/importance_scratch.hpp"

namespace refreekv::inline v0::cuda_detail {

/// An element of a row, as it is multiplied with a key: the i-th row of a KV head, [q_head, row].
template <class Seen>
[[nodiscard]] REFREEKV_DEVICE double scaled_query(const Seen& seen, index_t rows, index_t sequence,
                                                  index_t kv_head, index_t i,
                                                  index_t dim) noexcept {
  const index_t group = seen.q_heads() / seen.kv_heads();
  return double{seen.info.attention.scale *
                widen(seen.queries(sequence, seen.window() - rows + i % rows,
                                   kv_head * group + i / rows, dim))};
}

/// X^T X of the rows of each KV head, its lower half, to normal [sequence, kv_head, head_dim + 1,
/// head_dim]. A warp a row of it.
template <class Seen>
struct normal_body {
  struct shared {};
  Seen seen;
  index_t rows;
  double* normal;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t parts() const noexcept {
    return (seen.head_dim() + block_warps - 1) / block_warps;
  }
  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads() * parts();
  }

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t head = item / parts(), dims = seen.head_dim();
    const index_t sequence = head / seen.kv_heads(), kv_head = head % seen.kv_heads();
    const index_t i = item % parts() * block_warps + warp_of(block);
    const index_t first = window_of(seen, sequence, rows).first_row();
    const index_t group = seen.q_heads() / seen.kv_heads();
    double* to = normal + (head * (dims + 1) + i) * dims;
    for (index_t j = lane_of(block); i < dims && j <= i; j += warp_threads) {
      double sum = 0;
      for (index_t g = 0; g < group; ++g) {
        for (index_t r = first; r < rows; ++r) {
          sum += scaled_query(seen, rows, sequence, kv_head, g * rows + r, i) *
                 scaled_query(seen, rows, sequence, kv_head, g * rows + r, j);
        }
      }
      to[j] = sum;
    }
  }
};

/// normal becomes -(normal + ridge * tr / head_dim * I)^-1, both halves of it; 0 where it is. In
/// double: the quotient of the largest and the smallest eigenvalue is up to head_dim / ridge.
template <class Seen>
struct invert_body {
  using shared = warp_values<double>;
  Seen seen;
  double ridge;
  double* normal;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return seen.sequences() * seen.kv_heads();
  }

  /// item: [sequence, kv_head]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t item) const noexcept {
    const index_t dims = seen.head_dim();
    double* const matrix = normal + item * (dims + 1) * dims;
    double* const column = matrix + dims * dims;
    double trace = 0;
    for (index_t i = block.rank(); i < dims; i += block_threads) trace += matrix[i * dims + i];
    trace = block_reduce(block, s, trace, plus{});
    if (!(trace > 0 && trace < HUGE_VAL)) {
      for (index_t i = block.rank(); i < dims * dims; i += block_threads) matrix[i] = 0;
      return;
    }
    for (index_t i = block.rank(); i < dims; i += block_threads) {
      matrix[i * dims + i] += ridge * trace / static_cast<double>(dims);
    }
    block.sync();
    // One row and column after the other, by the sweep that leaves it symmetric.
    for (index_t k = 0; k < dims; ++k) {
      for (index_t i = block.rank(); i < dims; i += block_threads) {
        column[i] = i >= k ? matrix[i * dims + k] : matrix[k * dims + i];
      }
      block.sync();
      const double inverse = 1 / column[k];
      for (index_t i = warp_of(block); i < dims; i += block_warps) {
        const double factor = column[i] * inverse;
        double* const row = matrix + i * dims;
        for (index_t j = lane_of(block); j <= i; j += warp_threads) {
          row[j] = i == k   ? (j == k ? -inverse : column[j] * inverse)
                   : j == k ? factor
                            : row[j] - factor * column[j];
        }
      }
      block.sync();
    }
    for (index_t i = warp_of(block); i < dims; i += block_warps) {
      for (index_t j = lane_of(block); j < i; j += warp_threads) {
        matrix[j * dims + i] = matrix[i * dims + j];
      }
    }
  }
};

/// The map [sequence, q_head, rows, head_dim]: of each row x, normal x. A warp a row.
template <class Seen>
struct map_body {
  struct shared {};
  Seen seen;
  index_t rows;
  const double* normal;
  float* map;

  [[nodiscard]] constexpr index_t items() const noexcept {
    return (seen.sequences() * seen.q_heads() * rows + block_warps - 1) / block_warps;
  }

  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t row = item * block_warps + warp_of(block), dims = seen.head_dim();
    const index_t of_head = seen.q_heads() / seen.kv_heads() * rows, head = row / of_head;
    const index_t sequence = head / seen.kv_heads();
    if (sequence >= seen.sequences() || row % rows < window_of(seen, sequence, rows).first_row()) {
      return;
    }
    const double* const matrix = normal + head * (dims + 1) * dims;
    for (index_t d = lane_of(block); d < dims; d += warp_threads) {
      double sum = 0;
      for (index_t e = 0; e < dims; ++e) {
        sum += matrix[e * dims + d] *
               scaled_query(seen, rows, sequence, head % seen.kv_heads(), row % of_head, e);
      }
      map[row * dims + d] = static_cast<float>(sum);
    }
  }
};

/// Leaves the map of each KV head.
template <class Backend, class Seen>
[[nodiscard]] status fit_maps(const Backend& on, const importance_rule& rule, const Seen& seen,
                              const importance_scratch& scratch) noexcept {
  arena memory = scratch.carve();
  double* const normal = scratch.take_normal(memory, seen);
  const normal_body<Seen> sums{scaled(seen), scratch.rows, normal};
  status s = run_blocks(on, sums.items(), sums);
  if (s != status::ok) return s;
  const invert_body<Seen> invert{seen, rule.ridge, normal};
  s = run_blocks(on, invert.items(), invert);
  if (s != status::ok) return s;
  const map_body<Seen> map{scaled(seen), scratch.rows, normal, scratch.map};
  return run_blocks(on, map.items(), map);
}

}  // namespace refreekv::inline v0::cuda_detail
