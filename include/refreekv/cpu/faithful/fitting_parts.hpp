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

  template <class Seen>
  static fitting_parts take(arena& from, const importance_rule& rule, const Seen& seen) noexcept {
    using product = observed_product<Seen>;
    const index_t heads = seen.q_heads() / seen.kv_heads(), rows = heads * rule.rows;
    const index_t dims = seen.head_dim(), value_dims = seen.values.head_dim(), block = rule.block;
    const index_t key_stride = whole_registers(dims), value_stride = whole_registers(value_dims);
    const index_t measured = heads * rule.measured(rule.rows);
    const index_t sizes = rule.error_term ? index_t{rule.sizes} : 1, parts = 2 * sizes + 1;
    fitting_parts p{};
    p.packed = from.take<typename product::packed>(heads, rule.rows, packed_dim<product>(dims));
    p.tile.gathered = from.take<std::byte>(tile_tokens, dims, index_t{sizeof(float)});
    p.tile.values = from.take<float>(rows, stride_of(rule));
    p.tile.statistics = from.take<chunk_statistics>(rows);
    p.value_rows = from.take<float>(block, value_stride);
    if (rule.stand_ins) {
      p.key_rows = from.take<float>(block, key_stride);
      p.queries = from.take<float>(dims, whole_registers(rows));
      p.map = from.take<float>(rows, key_stride);
      p.dropped = from.take<float>(block, whole_registers(sizes));
      p.weights = from.take<float>(sizes, whole_registers(block));
      p.masses = from.take<float>(rows, whole_registers(sizes));
      p.gaps = from.take<float>(sizes, whole_registers(rows));
      p.keys = from.take<float>(sizes, key_stride);
      p.values = from.take<float>(sizes, value_stride);
    }
    if (rule.error_term) {
      p.measured_queries = from.take<float>(dims, whole_registers(measured));
      p.log_sums = from.take<double>(measured);
      p.attention = from.take<float>(measured, stride_of(rule));
      p.own = from.take<float>(sizes, whole_registers(measured));
      p.graded = from.take<float>(measured, block);
      p.graded_rows = from.take<float>(block, value_stride);
      p.shares = from.take<double>(parts, measured);
    }
    const auto take_map = [&](arena& to) {
      p.normal = to.take<double>(dims, dims);
      p.solved = to.take<double>(dims, index_t{map_columns});
    };
    const auto take_outputs = [&](arena& to) {
      p.outputs = to.take<float>(parts, measured, value_stride);
    };
    arena map, outputs;
    if (rule.stand_ins) take_map(map);
    if (rule.error_term) take_outputs(outputs);
    auto* by_turns = from.take<std::byte>((std::max)(map.bytes(), outputs.bytes()));
    if (by_turns != nullptr) {
      arena first(by_turns), second(by_turns);
      if (rule.stand_ins) take_map(first);
      if (rule.error_term) take_outputs(second);
    }
    return p;
  }
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
