// SPDX-License-Identifier: Apache-2.0
// The memory in which the CPU fits stand-ins and measures what they are worth.
#pragma once

#include "refreekv/cpu/faithful/importance_rows.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// What one worker fits stand-ins and measures errors in. Strides are whole_registers of what they
/// stride over.
struct fitting_parts {
  void* packed;  ///< [q_head of the KV head, rows, packed_dim]
  tile_scratch tile;
  float* value_rows;  ///< [block, value_stride]
  // For stand-ins of some sizes at a time.
  float* key_rows;  ///< [block, key_stride]
  float* queries;   ///< [head_dim, row_stride], times the scale: columns are the KV head's rows
  float* map;       ///< [q_head of the KV head, rows, key_stride]: see fit_map
  double* normal;   ///< [head_dim, head_dim], where outputs come later
  double* solved;   ///< [head_dim, map_columns], the same
  float* dropped;   ///< [block, size_stride]: 1 where the size drops the token, 0 elsewhere
  float* weights;   ///< [size, block_stride]: attention of what is dropped, which sums to 1
  float* masses;    ///< [q_head of the KV head, rows, size_stride]
  float* gaps;      ///< [size, row_stride]
  float* keys;      ///< [size, key_stride]
  float* values;    ///< [size, value_stride]
  // For the error. Parts are what the tokens of a grade add to an output, [0, sizes], and then what
  // the stand-ins of a size do.
  float* measured_queries;  ///< [head_dim, measured_stride]: those columns of `queries`
  double* log_sums;         ///< [measured row]: log sum exp of a row's logits
  float* attention;         ///< [measured row, stride_of]
  float* own;               ///< [size, measured_stride]: attention to the stand-ins
  float* graded;            ///< [measured row, block]: attention to tokens of one grade
  float* graded_rows;       ///< [block, value_stride]: their values
  float* outputs;           ///< [part, measured row, value_stride]
  double* shares;           ///< [part, measured row]

  /// From one row of a tile to the next.
  static index_t stride_of(const importance_rule& rule) noexcept {
    return whole_registers(rule.block) + 16;
  }

  template <class Layer>
  static fitting_parts carve(arena& from, const importance_rule& rule,
                             const Layer& layer) noexcept {
    using product = observed_product<Layer>;
    const index_t heads = layer.q_heads() / layer.kv_heads(), rows = heads * rule.rows;
    const index_t dims = layer.head_dim(), value_dims = layer.values.head_dim(), block = rule.block;
    const index_t key_stride = whole_registers(dims), value_stride = whole_registers(value_dims);
    const index_t measured = heads * rule.measured(rule.rows);
    const index_t sizes = rule.error_term ? index_t{rule.sizes} : 1, parts = 2 * sizes + 1;
    fitting_parts p{};
    p.packed = from.array<typename product::packed>(heads, rule.rows, packed_dim<product>(dims));
    p.tile.gathered = from.array<std::byte>(tile_tokens, dims, index_t{sizeof(float)});
    p.tile.values = from.array<float>(rows, stride_of(rule));
    p.tile.statistics = from.array<chunk_statistics>(rows);
    p.value_rows = from.array<float>(block, value_stride);
    if (rule.stand_ins) {
      p.key_rows = from.array<float>(block, key_stride);
      p.queries = from.array<float>(dims, whole_registers(rows));
      p.map = from.array<float>(rows, key_stride);
      p.dropped = from.array<float>(block, whole_registers(sizes));
      p.weights = from.array<float>(sizes, whole_registers(block));
      p.masses = from.array<float>(rows, whole_registers(sizes));
      p.gaps = from.array<float>(sizes, whole_registers(rows));
      p.keys = from.array<float>(sizes, key_stride);
      p.values = from.array<float>(sizes, value_stride);
    }
    if (rule.error_term) {
      p.measured_queries = from.array<float>(dims, whole_registers(measured));
      p.log_sums = from.array<double>(measured);
      p.attention = from.array<float>(measured, stride_of(rule));
      p.own = from.array<float>(sizes, whole_registers(measured));
      p.graded = from.array<float>(measured, block);
      p.graded_rows = from.array<float>(block, value_stride);
      p.shares = from.array<double>(parts, measured);
    }
    const auto carve_map = [&](arena& to) {
      p.normal = to.array<double>(dims, dims);
      p.solved = to.array<double>(dims, index_t{map_columns});
    };
    const auto carve_outputs = [&](arena& to) {
      p.outputs = to.array<float>(parts, measured, value_stride);
    };
    arena map, outputs;
    if (rule.stand_ins) carve_map(map);
    if (rule.error_term) carve_outputs(outputs);
    auto* by_turns = from.array<std::byte>((std::max)(map.bytes(), outputs.bytes()));
    if (by_turns != nullptr) {
      arena first(by_turns), second(by_turns);
      if (rule.stand_ins) carve_map(first);
      if (rule.error_term) carve_outputs(second);
    }
    return p;
  }
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
