// SPDX-License-Identifier: Apache-2.0
// Stand-ins on the CPU: rows that take the place of what a size drops, and how far outputs are from
// those of the whole cache then.
#pragma once

#include "refreekv/cpu/grades.hpp"
#include "refreekv/stand_ins.hpp"

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
    std::byte* by_turns = from.take<std::byte>((std::max)(map.bytes(), outputs.bytes()));
    if (by_turns != nullptr) {
      arena first(by_turns), second(by_turns);
      if (rule.stand_ins) take_map(first);
      if (rule.error_term) take_outputs(second);
    }
    return p;
  }
};

/// How many rows stand in for what a size drops of one KV head: one for each block that loses a
/// token, but none for a single token, which is its own best stand-in. O(tokens).
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

/// One KV head whose tokens have grades.
template <class Seen>
class graded_head {
 public:
  graded_head(const importance_rule& rule, const Seen& seen, index_t sequence, index_t kv_head,
              const importance_scratch& scratch, index_t worker, const grade* grades) noexcept
      : rule_(rule),
        seen_(seen),
        sequence_(sequence),
        kv_head_(kv_head),
        grades_(grades),
        work_(parts_of(scratch, worker, rule, seen)),
        rows_(scratch.pack_head(rule, seen, sequence, kv_head, work_.packed)),
        stride_(fitting_parts::stride_of(rule)),
        key_stride_(whole_registers(seen.head_dim())),
        value_stride_(whole_registers(seen.values.head_dim())),
        row_stride_(whole_registers(rows_.count())),
        first_measured_((rows_.window.rows - 1) % rule.error_rows),
        measured_(rule.measured(rows_.window.rows)),
        measured_stride_(whole_registers(measured_rows())) {
    for (index_t t = 0; t < rows_.window.tokens; ++t) {
      if (grades[t] != grade_never) ++dropped_[grades[t]];
    }
    // From how many tokens have a grade to how many a size drops.
    index_t larger = 0;
    for (index_t size = rule.sizes; size >= 0; --size) {
      const index_t own = dropped_[size];
      dropped_[size] = larger;
      larger += own;
    }
    if (rule.stand_ins) fit_head();
  }

  /// Writes the stand-ins of a size: one for each block that loses a token, and where there are to
  /// be more than that, as many as can be for each part of the first ones.
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
        std::copy_n(work_.keys, seen_.head_dim(), to.keys.at(sequence_, kv_head_, written));
        std::copy_n(work_.values, seen_.values.head_dim(),
                    to.values.at(sequence_, kv_head_, written));
        ++written;
      }
    });
  }

  /// Into errors [sizes + 1] the relative error of each size's outputs, summed over the measured
  /// rows.
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

  [[nodiscard]] index_t measured_rows() const noexcept { return rows_.queries.heads * measured_; }

 private:
  static fitting_parts parts_of(const importance_scratch& scratch, index_t worker,
                                const importance_rule& rule, const Seen& seen) noexcept {
    arena carve(scratch.memory + worker * scratch.worker_bytes);
    return fitting_parts::take(carve, rule, seen);
  }

  /// Whether a size drops a listed token.
  [[nodiscard]] bool drops(index_t i, index_t size) const noexcept { return levels_[i] > size; }
  [[nodiscard]] bool stands_in(index_t size) const noexcept { return dropped_[size] >= 2; }
  /// The row that is measured as the e-th.
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

  /// Makes tokens of a block the ones that are worked on, in the tile's columns.
  template <class Wanted>
  void list(token_range block, const Wanted& wanted) noexcept {
    listed_ = 0;
    for (index_t t = block.begin; t < block.end; ++t) {
      if (!wanted(grades_[t])) continue;
      levels_[listed_] = grades_[t];
      tokens_[listed_++] = static_cast<position_t>(t);
    }
  }

  /// Fills the tile with the bare logits of the listed tokens, and their rows.
  void read_block() noexcept {
    const auto& keys = observed(seen_).keys;
    rows_.fill_bare_logits(block_addresses(keys, sequence_, kv_head_, tokens_, listed_), work_.tile,
                           stride_);
    for (index_t i = 0; i < listed_; ++i) {
      const auto value = seen_.values.run_at(sequence_, kv_head_, tokens_[i]);
      widen_row(value.data, value.dim_stride, seen_.values.head_dim(),
                work_.value_rows + i * value_stride_);
      if (!rule_.stand_ins) continue;
      const auto key = keys.run_at(sequence_, kv_head_, tokens_[i]);
      widen_row(key.data, key.dim_stride, seen_.head_dim(), work_.key_rows + i * key_stride_);
    }
  }

  /// What all blocks of a head share: its queries, and the map that corrects keys by them.
  void fit_head() noexcept {
    const auto& what = observed(seen_);
    const index_t dims = seen_.head_dim(), rows = rows_.count(), count = rows_.window.rows;
    std::fill_n(work_.key_rows, rule_.block * key_stride_, 0.0f);
    std::fill_n(work_.value_rows, rule_.block * value_stride_, 0.0f);
    std::fill_n(work_.queries, dims * row_stride_, 0.0f);
    std::fill_n(work_.map, rows * key_stride_, 0.0f);
    for (index_t i = 0; i < rows; ++i) {
      const auto* query = what.queries.at(sequence_, seen_.window() - count + i % count,
                                          rows_.queries.first_head + i / count);
      for (index_t d = 0; d < dims; ++d) {
        const float x = rows_.queries.scale * widen(query[d * what.queries.stride(3)]);
        work_.map[i * key_stride_ + d] = x;
        work_.queries[d * row_stride_ + i] = x;
      }
    }
    fit_map(work_.map, rows, dims, key_stride_, rule_.ridge, work_.normal, work_.solved);
    if (!rule_.error_term) return;
    for (index_t e = 0; e < measured_rows(); ++e) {
      const row_normaliser& row = rows_.normalisers[row_of(e)];
      work_.log_sums[e] = static_cast<double>(row.unit) * std::numbers::ln2 + std::log(row.sum);
    }
    std::fill_n(work_.measured_queries, dims * measured_stride_, 0.0f);
    for (index_t d = 0; d < dims; ++d) {
      for (index_t e = 0; e < measured_rows(); ++e) {
        work_.measured_queries[d * measured_stride_ + e] =
            work_.queries[d * row_stride_ + row_of(e)];
      }
    }
  }

  /// Fits one row for what each of the sizes [first, first + count) drops of the listed tokens,
  /// from their bare logits, which are used up, and their rows. With a and S of the tokens that are
  /// dropped, a being their mean attention, normalised: the value is sum a v, and the key is k0 =
  /// sum a k moved to where its logits come near log sum exp S, in the ridge regression over all
  /// rows. Sizes that drop nothing of the block leave nothing of use.
  void fit_block(index_t first, index_t count) noexcept {
    constexpr auto most = static_cast<std::size_t>(chunk_tokens);
    const index_t rows = rows_.count(), block_stride = whole_registers(rule_.block);
    const index_t size_stride = whole_registers(count);

    float attention[most];  // the mean over the rows
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

    // By how much a key's logits are too large: where they are to be, and from there to what they
    // are.
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
        const float unit = work_.tile.statistics[i].unit * std::numbers::ln2_v<float>;
        gaps[i] = -(work_.masses[i * size_stride + c] + unit);
        if (cap > 0) gaps[i] = static_cast<float>(uncapped(static_cast<double>(gaps[i]), cap));
      }
    }
    add_product({work_.keys, key_stride_, 1}, {work_.queries, row_stride_}, count, seen_.head_dim(),
                row_stride_, work_.gaps, row_stride_);
    add_product({work_.gaps, row_stride_, 1}, {work_.map, key_stride_}, count, rows, key_stride_,
                work_.keys, key_stride_);
  }

  /// Turns the bare logits of the listed tokens into exponentials, each row in a unit of its own,
  /// nearly 0 for those that a size keeps; attention [listed token]: the mean over all rows.
  void exponentiate_dropped(index_t size, float* attention) noexcept {
    const index_t rows = rows_.count();
    const auto listed = static_cast<Eigen::Index>(listed_);
    Eigen::Map<Eigen::ArrayXf> sum(attention, listed);
    sum.setZero();
    float hidden_of[static_cast<std::size_t>(chunk_tokens)];  // -inf where the size keeps a token
    for (index_t i = 0; i < listed_; ++i) {
      hidden_of[i] = drops(i, size) ? 0 : -std::numeric_limits<float>::infinity();
    }
    const Eigen::Map<const Eigen::ArrayXf> hidden(hidden_of, listed);
    const bool all_see = rows_.window.all_see({tokens_[0], index_t{tokens_[listed_ - 1]} + 1});
    for (index_t r = 0; r < rows; ++r) {
      float* values = work_.tile.values + r * stride_;
      Eigen::Map<Eigen::ArrayXf>(values, listed) += hidden;
      const float unit = unit_of(values, listed_);
      exponentiate(values, listed_, unit);
      work_.tile.statistics[r].unit = unit;
      const auto share =
          static_cast<float>(attention_at(unit, rows_.normalisers[r]) / static_cast<double>(rows));
      if (all_see) {
        sum += share * Eigen::Map<const Eigen::ArrayXf>(values, listed);
        continue;
      }
      const token_range visible = rows_.window.visible(r % rows_.window.rows);
      for (index_t i = 0; i < listed_; ++i) {
        const bool seen = visible.begin <= tokens_[i] && tokens_[i] < visible.end;
        attention[i] += seen ? share * values[i] : 0;
      }
    }
    sum += 1e-12f;  // where no row looks all weigh the same
  }

  /// The attention that measured rows give to the stand-ins of a block, in units of the whole
  /// cache's.
  void attend_to_stand_ins() noexcept {
    const index_t measured = measured_rows(), sizes = rule_.sizes;
    const float cap = rows_.queries.attention.soft_cap;
    std::fill_n(work_.own, sizes * measured_stride_, 0.0f);
    add_product({work_.keys, key_stride_, 1}, {work_.measured_queries, measured_stride_}, sizes,
                seen_.head_dim(), measured_stride_, work_.own, measured_stride_);
    for (index_t size = 0; size < sizes; ++size) {
      float* own = work_.own + size * measured_stride_;
      for (index_t e = 0; cap > 0 && e < measured; e += chunk_tokens) {
        cap_softly(own + e, (std::min)(chunk_tokens, measured - e), static_cast<double>(cap));
      }
      for (index_t e = 0; e < measured; ++e) {
        own[e] = static_cast<float>(static_cast<double>(own[e]) - work_.log_sums[e]);
      }
      Eigen::Map<Eigen::ArrayXf> x(own, static_cast<Eigen::Index>(measured));
      x = (x.max)(-85.0f).exp();
    }
  }

  /// Adds the output of a block's tokens to those of their grades.
  void add_tokens() noexcept {
    const index_t measured = measured_rows();
    for (index_t g = 0; g <= rule_.sizes; ++g) {
      index_t count = 0;
      for (index_t i = 0; i < listed_; ++i) {
        if (levels_[i] != g) continue;
        for (index_t e = 0; e < measured; ++e) {
          work_.graded[e * rule_.block + count] = work_.attention[e * stride_ + i];
        }
        std::copy_n(work_.value_rows + i * value_stride_, seen_.values.head_dim(),
                    work_.graded_rows + count * value_stride_);
        ++count;
      }
      add_output(g, {work_.graded, rule_.block, 1}, work_.graded_rows, count);
    }
  }

  /// Adds the output of a block's stand-ins to those of their sizes. Sizes have nothing in common:
  /// of one that fits badly the attention may be so large that others would drown in it.
  void add_stand_ins() noexcept {
    for (index_t size = 0; size < rule_.sizes; ++size) {
      bool any = false;
      for (index_t i = 0; i < listed_; ++i) any |= drops(i, size);
      if (!any || !stands_in(size)) return;
      add_output(rule_.sizes + 1 + size, {work_.own + size * measured_stride_, 1, 0},
                 work_.values + size * value_stride_, 1);
    }
  }

  /// attention: [measured row, row]; rows: [row, value_stride]
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
                                        static_cast<Eigen::Index>(seen_.values.head_dim()));
    };
    // From what a grade adds to what a size keeps.
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
      double sink = 0;  // what no token gets
      if (sinks.data() != nullptr) {
        const auto logit = static_cast<double>(sinks(rows_.queries.first_head + e / measured_));
        sink = std::exp2(logit / std::numbers::ln2 - static_cast<double>(row.unit)) / row.sum;
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

  const importance_rule& rule_;
  const Seen& seen_;
  index_t sequence_, kv_head_;
  const grade* grades_;
  fitting_parts work_;
  head_rows<observed_product<Seen>> rows_;
  index_t stride_, key_stride_, value_stride_, row_stride_;
  index_t first_measured_, measured_;  // rows of each query head
  index_t measured_stride_;
  index_t dropped_[max_sizes + 1] = {};  // tokens that a size drops
  index_t listed_ = 0;
  position_t tokens_[static_cast<std::size_t>(chunk_tokens)];  // [listed_]
  grade levels_[static_cast<std::size_t>(chunk_tokens)];       // [listed_]
};

template <class Seen>
importance_scratch take_importance_scratch(arena& from, index_t workers,
                                           const importance_rule& rule, const Seen& seen) noexcept {
  importance_scratch s{};
  s.normalisers = from.take<row_normaliser>(seen.sequences(), seen.q_heads(), rule.rows);
  if (rule.error_term) {
    s.errors = from.take<double>(seen.sequences(), seen.kv_heads(), index_t{rule.sizes} + 1);
  }
  arena weighing, fitting;
  (void)importance_scratch::take_weighing(weighing, rule, seen);
  if (rule.error_term || rule.stand_ins) (void)fitting_parts::take(fitting, rule, seen);
  s.worker_bytes = whole_lines((std::max)(weighing.bytes(), fitting.bytes()));
  arena sorted;
  (void)sorted.take<float>(seen.sequences(), seen.kv_heads(), seen.capacity());
  arena all;
  (void)all.take<std::byte>(workers, s.worker_bytes);
  s.memory = from.take<std::byte>((std::max)(sorted.bytes(), all.bytes()));
  return s;
}

template <class Executor, class Seen>
void find_sizes(const Executor& on, const importance_rule& rule, const Seen& seen,
                const view<const grade, 3>& grades, const double* lost, position_t* sizes,
                const importance_scratch& scratch) noexcept {
  const index_t kv_heads = seen.kv_heads(), steps = index_t{rule.sizes} + 1;
  const auto errors_of = [&](index_t s, index_t h) {
    return scratch.errors + (s * kv_heads + h) * steps;
  };
  if (rule.error_term) {
    for_each_head(
        on, seen, attention_work(observed(seen), rule.rows), [&](int worker, index_t s, index_t h) {
          if (!(lost[s * steps] > 0)) return;  // all sizes are the same
          graded_head(rule, seen, s, h, scratch, worker, grades.at(s, h)).measure(errors_of(s, h));
        });
  }
  for (index_t s = 0; s < seen.sequences(); ++s) {
    const index_t rows =
        seen.q_heads() * rule.measured(window_of(observed(seen), s, rule.rows).count());
    sizes[s] = static_cast<position_t>(rule.smallest([&](index_t size) {
      const double share = lost[s * steps + size];
      if (!rule.error_term || !(lost[s * steps] > 0)) return rule.is_enough(share, 0);
      double error = 0;
      for (index_t h = 0; h < kv_heads; ++h) error += errors_of(s, h)[size];
      return rule.is_enough(share, error / static_cast<double>(rows));
    }));
  }
}

template <class Executor, class Seen>
void fit_stand_ins(const Executor& on, const importance_rule& rule, const Seen& seen,
                   const view<const grade, 3>& grades, const position_t* sizes,
                   const stand_in_rows<>& to, const importance_scratch& scratch) noexcept {
  for (index_t s = 0; s < seen.sequences(); ++s) {
    const query_window window = window_of(observed(seen), s, rule.rows);
    index_t most = 0;
    for (index_t h = 0; h < seen.kv_heads(); ++h) {
      to.counts(s, h) =
          static_cast<position_t>(stand_ins_of(rule, window, grades.at(s, h), sizes[s]));
      most = (std::max)(most, index_t{to.counts(s, h)});
    }
    for (index_t h = 0; rule.scope == cut_scope::layer && h < seen.kv_heads(); ++h) {
      to.counts(s, h) = static_cast<position_t>(most);
    }
  }
  for_each_head(on, seen, attention_work(observed(seen), rule.rows),
                [&](int worker, index_t s, index_t h) {
                  if (to.counts(s, h) == 0) return;
                  graded_head(rule, seen, s, h, scratch, worker, grades.at(s, h))
                      .write_stand_ins(sizes[s], to.counts(s, h), to);
                });
}

/// Writes rows [sequence, kv_head, stand_in, dim] beside what a compaction kept.
template <class Executor, kv_source Source>
void write_stand_ins(const Executor& on, const Source& source,
                     const view<const kept_count, 2>& kept, const view<const float, 4>& rows,
                     const view<const position_t, 2>& counts, compaction how) noexcept {
  using element_type = typename Source::element_type;
  static_assert(element<element_type>, "stand-ins are float, half or bfloat16, as the cache is");
  for_each_head(on, source, source.head_dim() / 32 + 1, [&](int, index_t s, index_t h) {
    const index_t first = first_stand_in(kept(s, h), counts(s, h), how);
    for (index_t i = 0; i < counts(s, h); ++i) {
      const auto run = source.run_at(s, h, first + i);
      const float* row = rows.at(s, h, i);
      for (index_t d = 0; d < source.head_dim(); ++d) {
        run.data[d * run.dim_stride] = narrow<element_type>(row[d]);
      }
    }
  });
}

}  // namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET
