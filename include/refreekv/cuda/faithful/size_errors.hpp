// SPDX-License-Identifier: Apache-2.0
// Finds the smallest size that is enough, by bisection on a device. Each step measures how far the
// outputs are from those of the whole cache. The number of steps depends on `sizes` alone, so the
// host launches all of them.
#pragma once

#include "refreekv/cuda/faithful/outputs.hpp"

namespace refreekv::inline v0::cuda_detail {

/// Starts the bisection where errors are measured; finds the size at once where they are not.
struct start_sizes {
  importance_rule rule;
  const double* lost;  ///< [sequence, sizes + 1]
  size_range* ranges;  ///< [sequence]
  position_t* sizes;   ///< [sequence]: the size to try next, then the result

  REFREEKV_DEVICE void operator()(index_t sequence) const noexcept {
    const double* const own = lost + sequence * (index_t{rule.sizes} + 1);
    size_range range{-1, static_cast<position_t>(rule.sizes)};
    if (!rule.error_term || !(own[0] > 0)) {  // the error is unused, or lost is 0 or NaN
      while (range.is_open()) {
        const position_t middle = range.middle();
        (rule.is_enough(own[middle], 0) ? range.high : range.low) = middle;
      }
    }
    ranges[sequence] = range;
    sizes[sequence] = range.middle();
  }
};

/// Sums outputs over the splits of a sequence, a warp per measured row. The first time outputs are
/// those of the whole cache, and the sum becomes `whole`. Later outputs are the part of it that a
/// size loses, and row_errors [sequence, q_head, measured] become |o' - o| / (|o| + 1e-9).
template <class Layer>
struct join_outputs_body {
  struct shared {};
  importance_rule rule;
  Layer layer;
  index_t dims;  ///< head_dim of the values
  const double* outputs;
  bool first;
  importance_scratch scratch;

  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t rows_of_head() const noexcept {
    return layer.q_heads() / layer.kv_heads() * scratch.measured;
  }
  [[nodiscard]] REFREEKV_HOST_DEVICE constexpr index_t parts() const noexcept {
    return (rows_of_head() + block_warps - 1) / block_warps;
  }
  [[nodiscard]] constexpr index_t items() const noexcept { return kv_head_items(layer) * parts(); }

  /// item: [sequence, kv_head, part]
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared&, index_t item) const noexcept {
    const index_t head = item / parts(), sequence = head / layer.kv_heads();
    const index_t kv_head = head % layer.kv_heads(), group = layer.q_heads() / layer.kv_heads();
    if (!scratch.ranges[sequence].is_open()) return;
    const query_window window = window_of(layer, sequence, rule.rows);
    const stepped_span span = measured_rows(rule, window, kv_head, group);
    const int row = narrow(item % parts() * block_warps + warp_of(block));
    if (row >= span.count()) return;
    const index_t splits = scratch.outputs.used(window.tokens);
    const double* const own =
        outputs + (head * scratch.outputs.count * rows_of_head() + row) * (dims + 1);
    double* const whole = scratch.whole + (head * rows_of_head() + row) * (dims + 1);
    const auto sum_of = [&](index_t d) {
      double sum = 0;
      for (index_t i = 0; i < splits; ++i) sum += own[i * rows_of_head() * (dims + 1) + d];
      return sum;
    };
    if (first) {
      for (index_t d = lane_of(block); d <= dims; d += warp_threads) whole[d] = sum_of(d);
      return;
    }
    const index_t q_head = span.q_head_of(row);
    const auto& sinks = layer.info.attention.sink_logits;
    const double* const log_sums =
        scratch.log_sums + (sequence * layer.q_heads() + q_head) * scratch.rows;
    const double sink =  // attention that no token gets
        sinks.data() != nullptr ? std::exp(double{sinks(q_head)} - log_sums[span.row_of(row)]) : 0;
    const double all = whole[dims] + sink, left = all - sum_of(dims);
    double square = 0, distance = 0;
    for (index_t d = lane_of(block); d < dims; d += warp_threads) {
      const double o = whole[d] / all, moved = (whole[d] - sum_of(d)) / left - o;
      square += o * o;
      distance += moved * moved;
    }
    square = block.warp_reduce(square, plus{});
    distance = block.warp_reduce(distance, plus{});
    if (lane_of(block) == 0) {
      scratch.row_errors[head * rows_of_head() + row] =
          std::sqrt(distance) / (std::sqrt(square) + 1e-9);
    }
  }
};

/// Performs one step of the bisection of each open sequence.
template <class Layer>
struct step_sizes_body {
  using shared = warp_values<double>;
  importance_rule rule;
  Layer layer;
  const double* lost;
  position_t* sizes;
  importance_scratch scratch;

  /// item: sequence
  template <thread_block Block>
  REFREEKV_DEVICE void operator()(Block& block, shared& s, index_t sequence) const noexcept {
    size_range range = scratch.ranges[sequence];
    if (!range.is_open()) return;
    const index_t group = layer.q_heads() / layer.kv_heads(), rows = group * scratch.measured;
    const index_t measured = group * rule.measured(window_of(layer, sequence, rule.rows).count());
    double error = 0;
    for (index_t i = block.rank(); i < layer.kv_heads() * measured; i += block_threads) {
      error +=
          scratch.row_errors[(sequence * layer.kv_heads() + i / measured) * rows + i % measured];
    }
    error = block_reduce(block, s, error, plus{});
    if (block.rank() != 0) return;
    const position_t middle = range.middle();
    const bool enough = rule.is_enough(lost[sequence * (index_t{rule.sizes} + 1) + middle],
                                       error / static_cast<double>(layer.kv_heads() * measured));
    (enough ? range.high : range.low) = middle;
    scratch.ranges[sequence] = range;
    sizes[sequence] = range.middle();
  }
};

/// Launches the kernels that sum outputs for find_sizes.
template <class Valued>
struct size_measure {
  using layer_type = std::remove_cvref_t<decltype(detail::plain(std::declval<const Valued&>()))>;
  using keys_type = std::remove_cvref_t<decltype(std::declval<layer_type>().keys)>;
  using memory = typename Valued::memory;

  importance_rule rule;
  const Valued& valued;
  const importance_scratch& scratch;
  double* outputs;

  template <class Backend, class Keys, class Values, class Tokens>
  [[nodiscard]] status add(const Backend& exec, const Keys& keys, const Values& values,
                           const Tokens& tokens) const noexcept {
    const layer_type& layer = detail::plain(valued);
    using rows_type = typename outputs_body<layer_type, Keys, Values, Tokens, 1>::rows_type;
    return with_tile<few_rows<rows_type>>(
        layer.q_heads() / layer.kv_heads() * scratch.measured, [&](auto tile) {
          const outputs_body<layer_type, Keys, Values, Tokens, tile()> body{rule,
                                                                            scaled(layer),
                                                                            keys,
                                                                            values,
                                                                            tokens,
                                                                            scratch.log_sums,
                                                                            scratch.outputs,
                                                                            scratch.measured,
                                                                            outputs};
          return run_blocks(exec, body.items(), body);
        });
  }
  template <class Backend>
  [[nodiscard]] status add_tokens(const Backend& exec, const graded_sizes<memory>& graded,
                                  bool all) const noexcept {
    return add(exec, detail::plain(valued).keys, valued.values,
               dropped_tokens<layer_type>{graded, all});
  }
  template <class Backend>
  [[nodiscard]] status add_stand_ins(const Backend& exec,
                                     const stand_in_rows<memory>& rows) const noexcept {
    return add(exec, dense<float, memory>(rows.keys), dense<float, memory>(rows.values),
               standing_rows<layer_type>{scratch.ranges, rows.counts});
  }
  template <class Backend>
  [[nodiscard]] status join(const Backend& exec, bool first) const noexcept {
    const join_outputs_body<layer_type> body{
        rule, detail::plain(valued), valued.values.shape().head_dim, outputs, first, scratch};
    return run_blocks(exec, body.items(), body);
  }
};

/// The primitive `find_sizes`: see `ops`.
template <class Backend, class Valued>
[[nodiscard]] status find_sizes(const Backend& exec, importance_rule rule, const Valued& valued,
                                const view<const grade, 3, typename Valued::memory>& grades,
                                const double* lost, position_t* sizes,
                                const stand_in_rows<typename Valued::memory>& to,
                                const importance_scratch& scratch) noexcept {
  const auto& layer = detail::plain(valued);
  rule.rows = scratch.rows;
  const start_sizes start{rule, lost, scratch.ranges, sizes};
  status s = run_blocks(exec, blocks_for(layer.sequences()),
                        for_each_body<start_sizes>{layer.sequences(), start});
  if (s != status::ok || !rule.error_term) return s;

  arena memory = scratch.carve();
  const size_measure<Valued> measure{rule, valued, scratch, scratch.carve_outputs(memory, valued)};
  const graded_sizes<typename Valued::memory> graded{grades, sizes, scratch.ranges};
  s = measure.add_tokens(exec, graded, true);
  if (s == status::ok) s = measure.join(exec, true);
  const step_sizes_body<std::remove_cvref_t<decltype(layer)>> step{rule, layer, lost, sizes,
                                                                   scratch};
  for (index_t open = index_t{rule.sizes} + 1; open > 1 && s == status::ok; open -= open / 2) {
    s = measure.add_tokens(exec, graded, false);
    if (s == status::ok && rule.stand_ins)
      s = fit_open(exec, rule, valued, graded, to, false, scratch);
    if (s == status::ok && rule.stand_ins) s = measure.add_stand_ins(exec, to);
    if (s == status::ok) s = measure.join(exec, false);
    if (s == status::ok) s = run_blocks(exec, layer.sequences(), step);
  }
  return s;
}

}  // namespace refreekv::inline v0::cuda_detail
