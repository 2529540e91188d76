// SPDX-License-Identifier: Apache-2.0
// One KV head with graded tokens, on the CPU: its blocks, and the stand-ins for the tokens that a
// size drops.
#pragma once

#include "refreekv/cpu/faithful/fitting_parts.hpp"
#include "refreekv/cpu/faithful/grades.hpp"
#include "refreekv/decision/stand_ins.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// Returns the number of stand-ins of one KV head at a size: one for each block that loses a token.
/// Returns 0 if fewer than two tokens are dropped: a stand-in would take the slot of a single one.
/// O(tokens).
[[nodiscard]] inline index_t stand_ins_of(const importance_rule& rule, const query_window& window,
                                          const grade* grades, index_t size) noexcept {
  index_t tokens = 0, blocks = 0, last = -1;
  for (index_t t = importance_rule::seen_by(window).begin; t < window.tokens; ++t) {
    if (grades[t] <= size) continue;
    ++tokens;
    blocks += t / rule.block != last ? 1 : 0;
    last = t / rule.block;
  }
  return tokens < 2 ? 0 : blocks;
}

/// One KV head with graded tokens. Bare logits have the soft cap, but no mask and no position.
template <class Layer>
class graded_head {
 public:
  graded_head(const importance_rule& rule, const Layer& layer, index_t sequence, index_t kv_head,
              const importance_scratch& scratch, index_t worker, const grade* grades) noexcept
      : rule_(rule),
        layer_(layer),
        sequence_(sequence),
        kv_head_(kv_head),
        grades_(grades),
        work_(parts_of(scratch, worker, rule, layer)),
        rows_(scratch.pack_head(rule, layer, sequence, kv_head, work_.packed)),
        stride_(fitting_parts::stride_of(rule)),
        key_stride_(whole_registers(layer.head_dim())),
        value_stride_(whole_registers(layer.values.shape().head_dim)),
        row_stride_(whole_registers(rows_.count())),
        first_measured_((rows_.window.rows - 1) % rule.error_rows),
        measured_(rule.measured(rows_.window.rows)),
        measured_stride_(whole_registers(measured_rows())) {
    for (index_t t = 0; t < rows_.window.tokens; ++t) {
      if (grades[t] != grade_never) ++dropped_[grades[t]];
    }
    // Converts the number of tokens of each grade to the number of tokens that each size drops.
    index_t larger = 0;
    for (index_t size = rule.sizes; size >= 0; --size) {
      const index_t own = dropped_[size];
      dropped_[size] = larger;
      larger += own;
    }
    if (rule.stand_ins) fit_head();
  }

  /// Writes `count` stand-ins of a size to `to`: one for each block that loses a token. If `count`
  /// is larger, the first blocks get the others, at most one for each dropped token. The stand-ins
  /// of a block then fit equal parts of its dropped tokens.
  void write_stand_ins(index_t size, index_t count, const stand_in_rows<>& to) noexcept {
    index_t written = 0, spare = count - stand_ins_of(rule_, rows_.window, grades_, size);
    for_each_block([&](token_range block) {
      list(block, [&](grade g) { return g > size; });
      if (listed_ == 0) return;
      const index_t all = listed_, parts = (std::min)(all, 1 + spare);
      spare -= parts - 1;
      for (index_t part = 0; part < parts; ++part) {
        index_t before = 0;
        list(block, [&](grade g) { return g > size && before++ * parts / all == part; });
        read_block();
        fit_block(size, 1);
        std::copy_n(work_.keys, layer_.head_dim(), to.keys.at(sequence_, kv_head_, written));
        std::copy_n(work_.values, layer_.values.shape().head_dim,
                    to.values.at(sequence_, kv_head_, written));
        ++written;
      }
    });
  }

  [[nodiscard]] index_t measured_rows() const noexcept { return rows_.queries.heads * measured_; }

 protected:
  static fitting_parts parts_of(const importance_scratch& scratch, index_t worker,
                                const importance_rule& rule, const Layer& layer) noexcept {
    arena carve(scratch.memory + worker * scratch.worker_bytes);
    return fitting_parts::carve(carve, rule, layer);
  }

  /// Returns whether a size drops listed token i.
  [[nodiscard]] bool drops(index_t i, index_t size) const noexcept { return levels_[i] > size; }
  [[nodiscard]] bool stands_in(index_t size) const noexcept { return dropped_[size] >= 2; }
  /// Returns the index of the e-th measured row.
  [[nodiscard]] index_t row_of(index_t e) const noexcept {
    return e / measured_ * rows_.window.rows + first_measured_ + e % measured_ * rule_.error_rows;
  }

  template <class F>
  void for_each_block(const F& f) const noexcept {
    const auto [begin, end] = importance_rule::seen_by(rows_.window);
    for (index_t t = begin; t < end;) {
      const index_t next = (std::min)(end, (t / rule_.block + 1) * rule_.block);
      f(token_range{t, next});
      t = next;
    }
  }

  /// Lists the tokens of a block that `wanted` selects by grade: the columns of the tile.
  template <class Wanted>
  void list(token_range block, const Wanted& wanted) noexcept {
    listed_ = 0;
    for (index_t t = block.begin; t < block.end; ++t) {
      if (!wanted(grades_[t])) continue;
      levels_[listed_] = grades_[t];
      tokens_[listed_++] = static_cast<position_t>(t);
    }
  }

  /// Writes the bare logits of the listed tokens to the tile, and reads their keys and values.
  void read_block() noexcept {
    const auto& keys = detail::plain(layer_).keys;
    rows_.fill_bare_logits(chunk_addresses(keys, sequence_, kv_head_, tokens_, listed_), work_.tile,
                           stride_);
    for (index_t i = 0; i < listed_; ++i) {
      const auto value = layer_.values.run_at(sequence_, kv_head_, tokens_[i]);
      widen_row(value.data, value.dim_stride, layer_.values.shape().head_dim,
                work_.value_rows + i * value_stride_);
      if (!rule_.stand_ins) continue;
      const auto key = keys.run_at(sequence_, kv_head_, tokens_[i]);
      widen_row(key.data, key.dim_stride, layer_.head_dim(), work_.key_rows + i * key_stride_);
    }
  }

  /// Prepares what all blocks of a head share: its queries, and the map that corrects keys.
  void fit_head() noexcept {
    const auto& plain = detail::plain(layer_);
    const index_t dims = layer_.head_dim(), rows = rows_.count(), count = rows_.window.rows;
    std::fill_n(work_.key_rows, rule_.block * key_stride_, 0.0f);
    std::fill_n(work_.value_rows, rule_.block * value_stride_, 0.0f);
    std::fill_n(work_.queries, dims * row_stride_, 0.0f);
    std::fill_n(work_.map, rows * key_stride_, 0.0f);
    for (index_t i = 0; i < rows; ++i) {
      const auto* query = plain.queries.at(sequence_, layer_.window() - count + i % count,
                                           rows_.queries.first_head + i / count);
      for (index_t d = 0; d < dims; ++d) {
        const float x = rows_.queries.scale * widen(query[d * plain.queries.stride(3)]);
        work_.map[i * key_stride_ + d] = x;
        work_.queries[d * row_stride_ + i] = x;
      }
    }
    fit_map(work_.map, rows, dims, key_stride_, rule_.ridge, work_.normal, work_.solved);
    if (!rule_.error_term) return;
    for (index_t e = 0; e < measured_rows(); ++e) {
      work_.log_sums[e] = rows_.normalisers[row_of(e)].log_sum();
    }
    std::fill_n(work_.measured_queries, dims * measured_stride_, 0.0f);
    for (index_t d = 0; d < dims; ++d) {
      for (index_t e = 0; e < measured_rows(); ++e) {
        work_.measured_queries[d * measured_stride_ + e] =
            work_.queries[d * row_stride_ + row_of(e)];
      }
    }
  }

  /// For each of the sizes [first, first + count), fits one stand-in for the listed tokens that the
  /// size drops. Requires read_block; overwrites the bare logits. Over the dropped tokens, let a be
  /// their attention, averaged over the rows and normalised; k and v their keys and values; S their
  /// bare logits. The value is sum a v. The key is k0 = sum a k, moved so that its logits come near
  /// log sum exp S, by ridge regression over all rows. A size that drops nothing of the block gets
  /// an undefined stand-in.
  void fit_block(index_t first, index_t count) noexcept {
    constexpr auto most = static_cast<std::size_t>(chunk_tokens);
    const index_t rows = rows_.count(), block_stride = whole_registers(rule_.block);
    const index_t size_stride = whole_registers(count);

    float attention[most];  // mean over the rows
    exponentiate_dropped(first, attention);
    std::fill_n(work_.weights, count * block_stride, 0.0f);
    std::fill_n(work_.dropped, listed_ * size_stride, 0.0f);
    for (index_t c = 0; c < count; ++c) {
      double total = 0;
      for (index_t i = 0; i < listed_; ++i) {
        if (drops(i, first + c)) total += static_cast<double>(attention[i]);
      }
      for (index_t i = 0; i < listed_; ++i) {
        if (!drops(i, first + c)) continue;
        work_.dropped[i * size_stride + c] = 1;
        work_.weights[c * block_stride + i] =
            static_cast<float>(static_cast<double>(attention[i]) / total);
      }
    }
    std::fill_n(work_.keys, count * key_stride_, 0.0f);
    std::fill_n(work_.values, count * value_stride_, 0.0f);
    add_product({work_.weights, block_stride, 1}, {work_.key_rows, key_stride_}, count, listed_,
                key_stride_, work_.keys, key_stride_);
    add_product({work_.weights, block_stride, 1}, {work_.value_rows, value_stride_}, count, listed_,
                value_stride_, work_.values, value_stride_);

    // How much a key's logits are too large: minus the wanted logits, then plus the actual ones.
    std::fill_n(work_.masses, rows * size_stride, 0.0f);
    add_product({work_.tile.values, stride_, 1}, {work_.dropped, size_stride}, rows, listed_,
                size_stride, work_.masses, size_stride);
    Eigen::Map<Eigen::ArrayXf> masses(work_.masses, static_cast<Eigen::Index>(rows * size_stride));
    masses = (masses.max)(1e-37f).log();
    const auto cap = static_cast<double>(rows_.queries.attention.soft_cap);
    std::fill_n(work_.gaps, count * row_stride_, 0.0f);
    for (index_t c = 0; c < count; ++c) {
      float* gaps = work_.gaps + c * row_stride_;
      for (index_t i = 0; i < rows; ++i) {
        const float exponent = work_.tile.statistics[i].exponent * std::numbers::ln2_v<float>;
        gaps[i] = -(work_.masses[i * size_stride + c] + exponent);
        if (cap > 0)
          gaps[i] = static_cast<float>(detail::uncapped(static_cast<double>(gaps[i]), cap));
      }
    }
    add_product({work_.keys, key_stride_, 1}, {work_.queries, row_stride_}, count,
                layer_.head_dim(), row_stride_, work_.gaps, row_stride_);
    add_product({work_.gaps, row_stride_, 1}, {work_.map, key_stride_}, count, rows, key_stride_,
                work_.keys, key_stride_);
  }

  /// Replaces the bare logits of the listed tokens by exponentials, each row with its own exponent.
  /// They are nearly 0 for tokens that the size keeps. Writes to attention [listed token] the mean
  /// over all rows.
  void exponentiate_dropped(index_t size, float* attention) noexcept {
    const index_t rows = rows_.count();
    const auto listed = static_cast<Eigen::Index>(listed_);
    Eigen::Map<Eigen::ArrayXf> sum(attention, listed);
    sum.setZero();
    float hidden_of[static_cast<std::size_t>(chunk_tokens)];  // -inf if the size keeps the token
    for (index_t i = 0; i < listed_; ++i) {
      hidden_of[i] = drops(i, size) ? 0 : -std::numeric_limits<float>::infinity();
    }
    const Eigen::Map<const Eigen::ArrayXf> hidden(hidden_of, listed);
    const bool all_see = rows_.window.all_see({tokens_[0], index_t{tokens_[listed_ - 1]} + 1});
    for (index_t r = 0; r < rows; ++r) {
      float* values = work_.tile.values + r * stride_;
      const row_normaliser& row = rows_.normalisers[r];
      if (!all_see) add_visible(r, size, values, attention);
      Eigen::Map<Eigen::ArrayXf>(values, listed) += hidden;
      const float exponent = exponent_of(values, listed_);
      exponentiate(values, listed_, exponent);
      work_.tile.statistics[r].exponent = exponent;
      if (!all_see) continue;
      const double share = detail::weight_of(exponent, row) / static_cast<double>(rows);
      sum += static_cast<float>(share) * Eigen::Map<const Eigen::ArrayXf>(values, listed);
    }
    sum += 1e-12f;  // equal weights if no row attends to them
  }

  /// Adds the attention of row r to the listed tokens that it sees and the size drops. The other
  /// tokens may have larger logits than all of these, so no exponent serves both.
  void add_visible(index_t r, index_t size, const float* logits, float* attention) const noexcept {
    const double log_sum = rows_.normalisers[r].log_sum();
    const auto rows = static_cast<double>(rows_.count());
    const token_range visible = rows_.window.visible(r % rows_.window.rows);
    for (index_t i = 0; i < listed_; ++i) {
      if (visible.begin > tokens_[i] || tokens_[i] >= visible.end || !drops(i, size)) continue;
      attention[i] += static_cast<float>(std::exp(static_cast<double>(logits[i]) - log_sum) / rows);
    }
  }

  const importance_rule& rule_;
  const Layer& layer_;
  index_t sequence_, kv_head_;
  const grade* grades_;
  fitting_parts work_;
  head_rows<plain_product<Layer>> rows_;
  index_t stride_, key_stride_, value_stride_, row_stride_;
  index_t first_measured_, measured_;  // rows of each query head
  index_t measured_stride_;
  index_t dropped_[max_sizes + 1] = {};  // tokens that each size drops
  index_t listed_ = 0;
  position_t tokens_[static_cast<std::size_t>(chunk_tokens)];  // [listed_]
  grade levels_[static_cast<std::size_t>(chunk_tokens)];       // [listed_]
};

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
