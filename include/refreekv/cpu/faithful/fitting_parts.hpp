// SPDX-License-Identifier: Apache-2.0
// Scratch in which the CPU fits stand-ins and measures the error of each size.
#pragma once

#include "refreekv/cpu/faithful/importance_rows.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Scratch in which one worker fits stand-ins and measures errors. Each stride is whole_registers
/// of the extent that it strides over.
struct fitting_parts {
  void* packed;  ///< [packed_bytes]
  tile_scratch tile;
  float* value_rows;  ///< [block, value_stride]
  // For the stand-ins of several sizes at a time.
  float* key_rows;  ///< [block, key_stride]
  float* queries;   ///< [head_dim, row_stride]: scaled; columns are the KV head's rows
  float* map;       ///< [q_head of the KV head, rows, key_stride]: see fit_map
  double* normal;   ///< [head_dim, head_dim]; shares memory with `outputs`
  double* solved;   ///< [head_dim, map_columns]; shares memory with `outputs`
  float* dropped;   ///< [block, size_stride]: 1 if the size drops the token, else 0
  float* weights;   ///< [size, block_stride]: attention of the dropped tokens; sums to 1
  float* masses;    ///< [q_head of the KV head, rows, size_stride]
  float* gaps;      ///< [size, row_stride]
  float* keys;      ///< [size, key_stride]
  float* values;    ///< [size, value_stride]
  // A stride is the extent in its name, in whole registers.
  // For the error. Parts [0, sizes] are the contributions of each grade's tokens to an output. The
  // following parts are the contributions of each size's stand-ins.
  float* measured_queries;  ///< [head_dim, measured_stride]: `queries` of measured rows
  double* log_sums;         ///< [measured row]: log sum exp of a row's logits
  float* attention;         ///< [measured row, stride_of]
  float* own;               ///< [size, measured_stride]: attention to the stand-ins
  float* graded;            ///< [measured row, block]: attention to the tokens of one grade
  float* graded_rows;       ///< [block, value_stride]: values of these tokens
  float* outputs;           ///< [part, measured row, value_stride]
  double* shares;           ///< [part, measured row]

  /// Returns the distance between rows of a tile, in floats.
  static index_t stride_of(const importance_rule& rule) noexcept {
    return whole_registers(rule.block) + 16;
  }

  template <class Layer>
  static fitting_parts carve(arena& from, const importance_rule& rule,
                             const Layer& layer) noexcept {
    using product = plain_product<Layer>;
    const index_t heads = layer.q_heads() / layer.kv_heads(), rows = heads * rule.rows;
    const index_t dims = layer.head_dim(), value_dims = layer.values.shape().head_dim,
                  block = rule.block;
    const index_t key_stride = whole_registers(dims), value_stride = whole_registers(value_dims);
    const index_t measured = heads * rule.measured(rule.rows);
    const index_t sizes = rule.error_term ? index_t{rule.sizes} : 1, parts = 2 * sizes + 1;
    fitting_parts p{};
    p.packed = from.array<std::byte>(packed_bytes<product>(rows, dims));
    p.tile.gathered =
        from.array<std::byte>(gathered_bytes<multiplied_key<plain_keys<Layer>>>(dims));
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
