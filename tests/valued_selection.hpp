// SPDX-License-Identifier: Apache-2.0
// Runs select of a policy that reads values and writes stand-ins, between canaries.
#pragma once

#include "ranked_selection.hpp"

/// Rows of floats [sequence, kv_head, stand_in, dim], with canaries between them, which must not
/// change.
class guarded_rows {
 public:
  guarded_rows(index_t sequences, index_t kv_heads, index_t rows, index_t dims)
      : sequences_(sequences),
        kv_heads_(kv_heads),
        rows_(rows),
        dims_(dims),
        values_(size(sequences * kv_heads * rows * (dims + gap) + gap), untouched) {}

  refreekv::view<float, 4> rows() {
    const index_t row = dims_ + gap;
    return {values_.data() + gap,
            {sequences_, kv_heads_, rows_, dims_},
            {kv_heads_ * rows_ * row, rows_ * row, row, 1}};
  }
  bool intact() const {
    for (std::size_t i = 0; i < values_.size(); ++i) {
      if (static_cast<index_t>(i) % (dims_ + gap) < gap && values_[i] != untouched) return false;
    }
    return true;
  }

 private:
  static constexpr index_t gap = 2;
  static constexpr float untouched = -7;

  index_t sequences_, kv_heads_, rows_, dims_;
  std::vector<float> values_;
};

using float_rows = std::vector<std::vector<float>>;  // [stand_in, dim]

struct valued_selection : ranked_selection {
  std::vector<float_rows> keys, values;  // of stand-ins, [sequence, kv_head]

  friend bool operator==(const valued_selection& a, const valued_selection& b) = default;
};

/// The memory of a decision with stand-ins, with canaries.
class guarded_decision {
 public:
  template <class Policy, class Layer>
  guarded_decision(const Policy& policy, const Layer& layer)
      : positions_(layer.sequences(), layer.kv_heads(), layer.capacity()),
        keys_(layer.sequences(), layer.kv_heads(), policy.most_stand_ins(layer.capacity()),
              layer.head_dim()),
        values_(layer.sequences(), layer.kv_heads(), policy.most_stand_ins(layer.capacity()),
                layer.values.shape().head_dim),
        counts_(size(layer.sequences() * layer.kv_heads()) + 1, -7),
        sequences_(layer.sequences()),
        kv_heads_(layer.kv_heads()),
        wanted_(policy.stand_ins) {}

  refreekv::kept_with_stand_ins<> kept() {
    if (!wanted_) return positions_.kept();
    return {positions_.kept(),
            {keys_.rows(), values_.rows(), {counts_.data(), {sequences_, kv_heads_}}}};
  }
  bool intact() const {
    return positions_.intact() && keys_.intact() && values_.intact() && counts_.back() == -7;
  }
  bool unwritten() const {
    return positions_.unwritten() &&
           std::all_of(counts_.begin(), counts_.end(), [](position_t c) { return c == -7; });
  }

 private:
  guarded_positions positions_;
  guarded_rows keys_, values_;
  std::vector<position_t> counts_;
  index_t sequences_, kv_heads_;
  bool wanted_;
};

inline float_rows rows_of(const refreekv::view<float, 4>& rows, index_t s, index_t h,
                          index_t count) {
  float_rows out;
  for (index_t i = 0; i < count; ++i) {
    const float* row = rows.at(s, h, i);
    out.emplace_back(row, row + rows.extent(3));
  }
  return out;
}

/// Runs select and checks the canaries. The workspace has `missing` bytes less than workspace_size.
template <class Policy, class Backend, class Layer>
valued_selection run_valued(const Policy& policy, const Backend& backend, const Layer& layer,
                            std::size_t missing = 0) {
  guarded_decision guarded(policy, layer);
  valued_selection out;
  if (!run_guarded(policy, backend, layer, guarded, missing, out)) return out;
  const refreekv::kept_with_stand_ins<> kept = guarded.kept();
  for (index_t s = 0; s < layer.sequences(); ++s) {
    for (index_t h = 0; h < layer.kv_heads(); ++h) {
      append(kept, layer, s, h, out);
      const index_t stand_ins = kept.length(s, h) - kept.counts(s, h).count;
      REQUIRE(stand_ins >= 0);
      REQUIRE(stand_ins <= kept.counts(s, h).dropped());
      out.keys.push_back(rows_of(kept.stand_ins.keys, s, h, stand_ins));
      out.values.push_back(rows_of(kept.stand_ins.values, s, h, stand_ins));
    }
  }
  return out;
}
