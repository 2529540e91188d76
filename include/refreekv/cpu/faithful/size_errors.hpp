// SPDX-License-Identifier: Apache-2.0
// The output error of each size, relative to the whole cache, on the CPU; and the smallest size
// that is enough.
#pragma once

#include "refreekv/cpu/faithful/graded_head.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// One KV head whose error is measured at each size.
template <class Layer>
class measured_head : public graded_head<Layer> {
 public:
  using graded_head<Layer>::graded_head;

  /// Writes to errors [sizes + 1] the relative error of each size's outputs, summed over the
  /// measured rows.
  void measure(double* errors) noexcept {
    const index_t sizes = rule_.sizes, measured = measured_rows(), parts = 2 * sizes + 1;
    std::fill_n(work_.outputs, parts * measured * value_stride_, 0.0f);
    std::fill_n(work_.shares, parts * measured, 0.0);
    std::fill_n(work_.graded_rows, rule_.block * value_stride_, 0.0f);
    for_each_block([&](token_range block) {
      list(block, [](grade) { return true; });
      read_block();
      for (index_t e = 0; e < measured; ++e) {
        float* attention = work_.attention + e * stride_;
        std::copy_n(work_.tile.values + row_of(e) * stride_, whole_registers(listed_), attention);
        rows_.attend(row_of(e), block, attention);
      }
      add_tokens();
      bool any = false;
      for (index_t i = 0; i < listed_; ++i) any |= drops(i, 0);
      if (!rule_.stand_ins || !any) return;
      fit_block(0, sizes);
      attend_to_stand_ins();
      add_stand_ins();
    });
    sum_errors(errors);
  }

 private:
  using base = graded_head<Layer>;
  using base::drops, base::list, base::read_block, base::fit_block, base::for_each_block;
  using base::levels_, base::stride_, base::key_stride_, base::value_stride_, base::measured_;
  using base::measured_stride_;
  using base::row_of, base::measured_rows, base::stands_in;
  using base::rule_, base::layer_, base::grades_, base::work_, base::rows_, base::listed_;

  /// Writes the attention of the measured rows to a block's stand-ins, normalised by the softmax of
  /// the whole cache.
  void attend_to_stand_ins() noexcept {
    const index_t measured = measured_rows(), sizes = rule_.sizes;
    const float cap = rows_.queries.attention.soft_cap;
    std::fill_n(work_.own, sizes * measured_stride_, 0.0f);
    add_product({work_.keys, key_stride_, 1}, {work_.measured_queries, measured_stride_}, sizes,
                layer_.head_dim(), measured_stride_, work_.own, measured_stride_);
    for (index_t size = 0; size < sizes; ++size) {
      float* own = work_.own + size * measured_stride_;
      for (index_t e = 0; cap > 0 && e < measured; e += chunk_tokens) {
        apply_soft_cap(own + e, (std::min)(chunk_tokens, measured - e), static_cast<double>(cap));
      }
      for (index_t e = 0; e < measured; ++e) {
        own[e] = static_cast<float>(static_cast<double>(own[e]) - work_.log_sums[e]);
      }
      Eigen::Map<Eigen::ArrayXf> x(own, static_cast<Eigen::Index>(measured));
      x = (x.max)(-85.0f).exp();
    }
  }

  /// Adds the contribution of a block's tokens to the outputs of their grades.
  void add_tokens() noexcept {
    const index_t measured = measured_rows();
    for (index_t g = 0; g <= rule_.sizes; ++g) {
      index_t count = 0;
      for (index_t i = 0; i < listed_; ++i) {
        if (levels_[i] != g) continue;
        for (index_t e = 0; e < measured; ++e) {
          work_.graded[e * rule_.block + count] = work_.attention[e * stride_ + i];
        }
        std::copy_n(work_.value_rows + i * value_stride_, layer_.values.shape().head_dim,
                    work_.graded_rows + count * value_stride_);
        ++count;
      }
      add_output(g, {work_.graded, rule_.block, 1}, work_.graded_rows, count);
    }
  }

  /// Adds the contribution of a block's stand-ins to the outputs of their sizes. Sizes do not share
  /// a sum: a badly fitted stand-in may have so much attention that rounding would lose the others.
  void add_stand_ins() noexcept {
    for (index_t size = 0; size < rule_.sizes; ++size) {
      bool any = false;
      for (index_t i = 0; i < listed_; ++i) any |= drops(i, size);
      if (!any || !stands_in(size)) return;
      add_output(rule_.sizes + 1 + size, {work_.own + size * measured_stride_, 1, 0},
                 work_.values + size * value_stride_, 1);
    }
  }

  /// Adds attention [measured row, row] . rows [row, value_stride] to the outputs of a part, and
  /// the attention of each measured row to its shares.
  void add_output(index_t part, const left_factor& attention, const float* rows,
                  index_t count) noexcept {
    const index_t measured = measured_rows();
    for (index_t e = 0; e < measured; ++e) {
      double& share = work_.shares[part * measured + e];
      for (index_t i = 0; i < count; ++i) {
        share += static_cast<double>(
            attention.data[e * attention.row_stride + i * attention.column_stride]);
      }
    }
    add_product(attention, {rows, value_stride_}, measured, count, value_stride_,
                work_.outputs + part * measured * value_stride_, value_stride_);
  }

  void sum_errors(double* errors) noexcept {
    const index_t sizes = rule_.sizes, measured = measured_rows();
    const auto output = [&](index_t part, index_t e) {
      return Eigen::Map<Eigen::ArrayXf>(work_.outputs + (part * measured + e) * value_stride_,
                                        static_cast<Eigen::Index>(layer_.values.shape().head_dim));
    };
    // Converts the contribution of each grade to the sum over all tokens that a size keeps.
    for (index_t size = 1; size <= sizes; ++size) {
      for (index_t e = 0; e < measured; ++e) {
        output(size, e) += output(size - 1, e);
        work_.shares[size * measured + e] += work_.shares[(size - 1) * measured + e];
      }
    }
    const auto& sinks = rows_.queries.attention.sink_logits;
    std::fill_n(errors, sizes + 1, 0.0);
    for (index_t e = 0; e < measured; ++e) {
      const row_normaliser& row = rows_.normalisers[row_of(e)];
      double sink = 0;  // attention that no token receives
      if (sinks.data() != nullptr) {
        const auto logit = static_cast<double>(sinks(rows_.queries.first_head + e / measured_));
        sink = std::exp2(logit / std::numbers::ln2 - static_cast<double>(row.exponent)) / row.sum;
      }
      const double all = work_.shares[sizes * measured + e] + sink;
      const auto whole = output(sizes, e).template cast<double>() / all;
      const double length = std::sqrt(whole.square().sum());
      for (index_t size = 0; size < sizes; ++size) {
        const index_t instead = sizes + 1 + size;
        const double left =
            work_.shares[size * measured + e] + work_.shares[instead * measured + e] + sink;
        const auto rest =
            (output(size, e).template cast<double>() + output(instead, e).template cast<double>()) /
            left;
        errors[size] += std::sqrt((rest - whole).square().sum()) / (length + 1e-9);
      }
    }
  }
};

template <class Executor, class Layer>
void find_sizes(const Executor& threads, const importance_rule& rule, const Layer& layer,
                const view<const grade, 3>& grades, const double* lost, position_t* sizes,
                const importance_scratch& scratch) noexcept {
  const index_t kv_heads = layer.kv_heads(), steps = index_t{rule.sizes} + 1;
  const auto errors_of = [&](index_t s, index_t h) {
    return scratch.errors + (s * kv_heads + h) * steps;
  };
  if (rule.error_term) {
    for_each_head(threads, layer.shape(), attention_work(detail::plain(layer), rule.rows),
                  [&](int worker, index_t s, index_t h) {
                    if (!(lost[s * steps] > 0)) return;  // all sizes are equal
                    measured_head<Layer>(rule, layer, s, h, scratch, worker, grades.at(s, h))
                        .measure(errors_of(s, h));
                  });
  }
  for (index_t s = 0; s < layer.sequences(); ++s) {
    const index_t rows =
        layer.q_heads() * rule.measured(window_of(detail::plain(layer), s, rule.rows).count());
    sizes[s] = static_cast<position_t>(rule.smallest([&](index_t size) {
      const double share = lost[s * steps + size];
      if (!rule.error_term || !(lost[s * steps] > 0)) return rule.is_enough(share, 0);
      double error = 0;
      for (index_t h = 0; h < kv_heads; ++h) error += errors_of(s, h)[size];
      return rule.is_enough(share, error / static_cast<double>(rows));
    }));
  }
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
