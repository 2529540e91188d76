// SPDX-License-Identifier: Apache-2.0
// Stand-ins on the CPU: rows that take the place of what a size drops, and how far outputs are from
// those of the whole cache then.
#pragma once

#include "refreekv/cpu/grades.hpp"
#include "refreekv/stand_ins.hpp"

namespace refreekv::inline v0::cpu_detail::inline REFREEKV_TARGET {

/// What one worker fits stand-ins and measures errors in.
struct fitting_parts {
  void* packed;  ///< [q_head of the KV head, rows, packed_dim]
  tile_scratch tile;
  float* value_rows;  ///< [block, value_stride]
  // For stand-ins. A column is a size.
  float* key_rows;  ///< [block, key_stride]
  float* queries;   ///< [q_head of the KV head, rows, key_stride], times the scale
  float* map;       ///< the same shape: see fit_map
  double* normal;   ///< [head_dim, head_dim]
  double* solved;   ///< [head_dim, map_columns]
  float* dropped;   ///< [block, column]: 1 where the size drops the token, 0 elsewhere
  float* weights;   ///< [block, column]: attention of what is dropped, which sums to 1
  float* gaps;      ///< [q_head of the KV head, rows, column]
  float* keys;      ///< [head_dim, column]
  float* values;    ///< [head_dim of the values, column]
  // For the error. A slot is a token or a stand-in; parts are what the tokens of a grade add to an
  // output, [0, sizes], and then what the stand-ins of a size do.
  float* attention;  ///< [measured row, tile_stride]
  float* own;        ///< [measured row, column]: attention to the stand-ins
  float* slots;      ///< [measured row, block]
  float* slot_rows;  ///< [block, value_stride]
  float* outputs;    ///< [part, measured row, value_stride]
  double* shares;    ///< [part, measured row]

  template <class Seen>
  static fitting_parts take(arena& from, const importance_rule& rule, const Seen& seen) noexcept {
    using product = observed_product<Seen>;
    const index_t heads = seen.q_heads() / seen.kv_heads(), rows = heads * rule.rows;
    const index_t dims = seen.head_dim(), value_dims = seen.values.head_dim(), block = rule.block;
    const index_t key_stride = whole_registers(dims), value_stride = whole_registers(value_dims);
    const index_t parts = 2 * index_t{rule.sizes} + 1;
    const index_t measured = heads * rule.measured(rule.rows);
    const index_t columns = whole_registers(rule.error_term ? rule.sizes : 1);
    fitting_parts p{};
    p.packed = from.take<typename product::packed>(heads, rule.rows, packed_dim<product>(dims));
    p.tile.gathered = from.take<std::byte>(tile_tokens, dims, index_t{sizeof(float)});
    p.tile.values = from.take<float>(rows, tile_stride);
    p.tile.statistics = from.take<chunk_statistics>(rows);
    p.value_rows = from.take<float>(block, value_stride);
    if (rule.stand_ins) {
      p.key_rows = from.take<float>(block, key_stride);
      p.queries = from.take<float>(rows, key_stride);
      p.map = from.take<float>(rows, key_stride);
      p.normal = from.take<double>(dims, dims);
      p.solved = from.take<double>(dims, index_t{map_columns});
      p.dropped = from.take<float>(block, columns);
      p.weights = from.take<float>(block, columns);
      p.gaps = from.take<float>(rows, columns);
      p.keys = from.take<float>(dims, columns);
      p.values = from.take<float>(value_dims, columns);
    }
    if (rule.error_term) {
      p.attention = from.take<float>(measured, tile_stride);
      p.own = from.take<float>(measured, columns);
      p.slots = from.take<float>(measured, block);
      p.slot_rows = from.take<float>(block, value_stride);
      p.outputs = from.take<float>(parts, measured, value_stride);
      p.shares = from.take<double>(parts, measured);
    }
    return p;
  }
};

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
        key_stride_(whole_registers(seen.head_dim())),
        value_stride_(whole_registers(seen.values.head_dim())),
        first_measured_((rows_.window.rows - 1) % rule.error_rows),
        measured_(rule.measured(rows_.window.rows)) {
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

  /// Writes the stand-ins of a size, to keys and values [stand_in, dim] with contiguous rows, and
  /// returns how many there are.
  index_t write_stand_ins(index_t size, const stand_in_rows<>& to) noexcept {
    if (!stands_in(size)) return 0;
    index_t written = 0;
    for_each_block([&](token_range block) {
      bool any = false;
      for (index_t t = block.begin; t < block.end; ++t) any |= drops(t, size);
      if (!any) return;
      fill_bare_logits(block);
      widen_rows(seen_.values, sequence_, kv_head_, block, work_.value_rows, value_stride_);
      fit_block(block, size, 1);
      const auto write = [&](const view<float, 4>& rows, const float* from, index_t dims) {
        float* row = rows.at(sequence_, kv_head_, written);
        for (index_t d = 0; d < dims; ++d) row[d] = from[d * whole_registers(1)];
      };
      write(to.keys, work_.keys, seen_.head_dim());
      write(to.values, work_.values, seen_.values.head_dim());
      ++written;
    });
    return written;
  }

  /// Into errors [sizes + 1] the relative error of each size's outputs, summed over the measured
  /// rows.
  void measure(double* errors) noexcept {
    const index_t sizes = rule_.sizes, measured = rows_.queries.heads * measured_;
    const index_t parts = 2 * sizes + 1;
    std::fill_n(work_.outputs, parts * measured * value_stride_, 0.0f);
    std::fill_n(work_.shares, parts * measured, 0.0);
    std::fill_n(work_.slot_rows, rule_.block * value_stride_, 0.0f);
    for_each_block([&](token_range block) {
      fill_bare_logits(block);
      for (index_t e = 0; e < measured; ++e) {
        float* attention = work_.attention + e * tile_stride;
        std::copy_n(work_.tile.values + row_of(e) * tile_stride, block.end - block.begin,
                    attention);
        rows_.attend(row_of(e), block, attention);
      }
      widen_rows(seen_.values, sequence_, kv_head_, block, work_.value_rows, value_stride_);
      add_tokens(block);
      if (rule_.stand_ins && drops_any(block, 0)) {
        fit_block(block, 0, sizes);
        attend_to_stand_ins(sizes);
        add_stand_ins(block);
      }
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

  [[nodiscard]] bool drops(index_t token, index_t size) const noexcept {
    return grades_[token] > size && grades_[token] != grade_never;
  }
  [[nodiscard]] bool drops_any(token_range block, index_t size) const noexcept {
    for (index_t t = block.begin; t < block.end; ++t) {
      if (drops(t, size)) return true;
    }
    return false;
  }
  /// One token is its own best stand-in.
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

  void fill_bare_logits(token_range block) noexcept {
    const key_block where{sequence_, kv_head_, block};
    const index_t next = (std::min)(block.end + rule_.block, rows_.window.tokens);
    const bool last = block.end == rows_.window.tokens;
    const key_block after{sequence_, kv_head_, last ? block : token_range{block.end, next}};
    rows_.fill_bare_logits(block, block_addresses(observed(seen_).keys, where, after), work_.tile);
  }

  /// What all blocks of a head share: its queries, and the map that corrects keys by them.
  void fit_head() noexcept {
    const auto& what = observed(seen_);
    const index_t dims = seen_.head_dim(), heads = rows_.queries.heads, count = rows_.window.rows;
    std::fill_n(work_.queries, heads * count * key_stride_, 0.0f);
    std::fill_n(work_.key_rows, rule_.block * key_stride_, 0.0f);
    for (index_t i = 0; i < heads * count; ++i) {
      const index_t row = seen_.window() - count + i % count;
      const auto* query = what.queries.at(sequence_, row, rows_.queries.first_head + i / count);
      for (index_t d = 0; d < dims; ++d) {
        work_.queries[i * key_stride_ + d] =
            rows_.queries.scale * widen(query[d * what.queries.stride(3)]);
      }
    }
    fit_map(work_.queries, heads * count, dims, key_stride_, rule_.ridge, work_.normal,
            work_.solved, work_.map);
  }

  /// Fits one row for what each of the sizes [first, first + count) drops of a block, from its bare
  /// logits, which are used up, and its values: work_.keys and work_.values. With a and S of the
  /// tokens that are dropped, a being their mean attention, normalised: the value is sum a v, and
  /// the key is k0 = sum a k moved to where its logits come near log sum exp S, in the ridge
  /// regression over all rows. Columns that drop nothing of the block hold nothing of use.
  void fit_block(token_range block, index_t first, index_t count) noexcept {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const index_t tokens = block.end - block.begin, columns = whole_registers(count);
    const index_t rows = rows_.count(), dims = seen_.head_dim();
    const index_t value_dims = seen_.values.head_dim();

    double attention[static_cast<std::size_t>(chunk_tokens)];
    std::fill_n(attention, tokens, 1e-12);  // where no row looks all weigh the same
    for (index_t i = 0; i < rows; ++i) {
      float* values = work_.tile.values + i * tile_stride;
      for (index_t t = 0; t < tokens; ++t) {
        values[t] = drops(block.begin + t, first) ? values[t] : none;
      }
      const float unit = unit_of(values, tokens);
      exponentiate(values, tokens, unit);
      work_.tile.statistics[i].unit = unit;
      const token_range visible = rows_.window.visible(i % rows_.window.rows);
      const index_t from = std::clamp(visible.begin, block.begin, block.end) - block.begin;
      const index_t to = std::clamp(visible.end, block.begin, block.end) - block.begin;
      const double share = attention_at(unit, rows_.normalisers[i]) / static_cast<double>(rows);
      for (index_t t = from; t < to; ++t) attention[t] += share * static_cast<double>(values[t]);
    }

    double totals[max_sizes] = {};
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t c = 0; c < columns; ++c) {
        const bool is_dropped = c < count && drops(block.begin + t, first + c);
        work_.dropped[t * columns + c] = is_dropped ? 1 : 0;
        if (is_dropped) totals[c] += attention[t];
      }
    }
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t c = 0; c < columns; ++c) {
        work_.weights[t * columns + c] =
            work_.dropped[t * columns + c] > 0 ? static_cast<float>(attention[t] / totals[c]) : 0;
      }
    }

    const auto sum = [&](const left_factor& left, const float* right, index_t height, index_t depth,
                         float* sums) {
      add_product(left, {right, columns}, height, depth, columns, sums, columns);
    };
    std::fill_n(work_.keys, dims * columns, 0.0f);
    std::fill_n(work_.values, value_dims * columns, 0.0f);
    std::fill_n(work_.gaps, rows * columns, 0.0f);
    widen_rows(observed(seen_).keys, sequence_, kv_head_, block, work_.key_rows, key_stride_);
    sum({work_.key_rows, 1, key_stride_}, work_.weights, dims, tokens, work_.keys);
    sum({work_.value_rows, 1, value_stride_}, work_.weights, value_dims, tokens, work_.values);
    sum({work_.tile.values, tile_stride, 1}, work_.dropped, rows, tokens, work_.gaps);
    const auto cap = static_cast<double>(rows_.queries.attention.soft_cap);
    for (index_t i = 0; i < rows; ++i) {
      Eigen::Map<Eigen::ArrayXf> gap(work_.gaps + i * columns, columns);
      gap = (gap > 0).select(gap.log() + work_.tile.statistics[i].unit * std::numbers::ln2_v<float>,
                             0.0f);
      for (index_t c = 0; cap > 0 && c < count; ++c) {
        gap[c] = static_cast<float>(uncapped(static_cast<double>(gap[c]), cap));
      }
      gap = -gap;
    }
    sum({work_.queries, key_stride_, 1}, work_.keys, rows, dims, work_.gaps);
    sum({work_.map, 1, key_stride_}, work_.gaps, dims, rows, work_.keys);
  }

  /// The attention that measured rows give to the stand-ins of a block, in units of the whole
  /// cache's.
  void attend_to_stand_ins(index_t sizes) noexcept {
    const index_t columns = whole_registers(sizes), heads = rows_.queries.heads;
    const float cap = rows_.queries.attention.soft_cap;
    std::fill_n(work_.own, heads * measured_ * columns, 0.0f);
    for (index_t g = 0; g < heads; ++g) {
      add_product(
          {work_.queries + row_of(g * measured_) * key_stride_, rule_.error_rows * key_stride_, 1},
          {work_.keys, columns}, measured_, seen_.head_dim(), columns,
          work_.own + g * measured_ * columns, columns);
    }
    for (index_t e = 0; e < heads * measured_; ++e) {
      float* own = work_.own + e * columns;
      if (cap > 0) cap_softly(own, sizes, static_cast<double>(cap));
      normalise_logits(own, sizes, rows_.normalisers[row_of(e)]);
    }
  }

  /// Adds the output of a block's tokens to those of their grades.
  void add_tokens(token_range block) noexcept {
    for (index_t g = 0; g <= rule_.sizes; ++g) {
      index_t slots = 0;
      for (index_t t = block.begin; t < block.end; ++t) {
        if (grades_[t] != g) continue;
        add_slot(slots++, work_.attention + (t - block.begin), tile_stride,
                 work_.value_rows + (t - block.begin) * value_stride_, 1);
      }
      add_slots(g, slots);
    }
  }

  /// Adds the output of a block's stand-ins to those of their sizes. Sizes have nothing in common:
  /// of one that fits badly the attention may be so large that others would drown in it.
  void add_stand_ins(token_range block) noexcept {
    const index_t sizes = rule_.sizes, columns = whole_registers(sizes);
    for (index_t size = 0; size < sizes && drops_any(block, size) && stands_in(size); ++size) {
      add_slot(0, work_.own + size, columns, work_.values + size, columns);
      add_slots(sizes + 1 + size, 1);
    }
  }

  /// Makes a row of values, and the attention to it, the next of those that are added together.
  void add_slot(index_t slot, const float* attention, index_t attention_stride, const float* row,
                index_t step) noexcept {
    for (index_t e = 0; e < measured_rows(); ++e) {
      work_.slots[e * rule_.block + slot] = attention[e * attention_stride];
    }
    float* to = work_.slot_rows + slot * value_stride_;
    for (index_t d = 0; d < seen_.values.head_dim(); ++d) to[d] = row[d * step];
  }
  void add_slots(index_t part, index_t slots) noexcept {
    const index_t measured = measured_rows();
    for (index_t e = 0; e < measured; ++e) {
      double& share = work_.shares[part * measured + e];
      for (index_t i = 0; i < slots; ++i) {
        share += static_cast<double>(work_.slots[e * rule_.block + i]);
      }
    }
    add_product({work_.slots, rule_.block, 1}, {work_.slot_rows, value_stride_}, measured, slots,
                value_stride_, work_.outputs + part * measured * value_stride_, value_stride_);
  }

  void sum_errors(double* errors) noexcept {
    const index_t sizes = rule_.sizes, measured = measured_rows();
    const auto output = [&](index_t part, index_t e) {
      return Eigen::Map<Eigen::ArrayXf>(work_.outputs + (part * measured + e) * value_stride_,
                                        seen_.values.head_dim());
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
  index_t key_stride_, value_stride_;
  index_t first_measured_, measured_;  // rows of each query head
  index_t dropped_[max_sizes + 1] = {};
};

template <class Seen>
importance_scratch take_importance_scratch(arena& from, index_t workers,
                                           const importance_rule& rule, const Seen& seen) noexcept {
  importance_scratch s{};
  s.normalisers = from.take<row_normaliser>(seen.sequences(), seen.q_heads(), rule.rows);
  s.sorted = from.take<float>(seen.sequences(), seen.kv_heads(), seen.capacity());
  if (rule.error_term) {
    s.errors = from.take<double>(seen.sequences(), seen.kv_heads(), index_t{rule.sizes} + 1);
  }
  arena weighing, fitting;
  (void)importance_scratch::take_weighing(weighing, rule, seen);
  if (rule.error_term || rule.stand_ins) (void)fitting_parts::take(fitting, rule, seen);
  s.worker_bytes = whole_lines((std::max)(weighing.bytes(), fitting.bytes()));
  s.memory = from.take<std::byte>(workers, s.worker_bytes);
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
  for_each_head(
      on, seen, attention_work(observed(seen), rule.rows), [&](int worker, index_t s, index_t h) {
        const grade* own = grades.at(s, h);
        const auto is_dropped = [&](grade g) { return g > sizes[s] && g != grade_never; };
        index_t written = 0;
        if (std::any_of(own, own + seen.tokens(s), is_dropped)) {
          written =
              graded_head(rule, seen, s, h, scratch, worker, own).write_stand_ins(sizes[s], to);
        }
        to.counts(s, h) = static_cast<position_t>(written);
      });
}

/// Writes rows [sequence, kv_head, stand_in, dim] into the slots beside what a compaction kept.
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
