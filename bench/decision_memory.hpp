// SPDX-License-Identifier: Apache-2.0
// Memory of a policy's decision about one layer that is measured.
#pragma once

#include "layer.hpp"

namespace bench {

/// A decision about one layer, in whatever form.
template <class Decision>
class decision_memory;

template <>
class decision_memory<refreekv::kept_ranges<>> {
 public:
  decision_memory(index_t, index_t) {}
  refreekv::kept_ranges<> kept() { return {&range_, {1, 1}}; }
  refreekv::view<const refreekv::kept_range, 2> decided() { return kept(); }
  double fraction() const { return range_.kept_fraction(); }

 private:
  refreekv::kept_range range_;
};

template <>
class decision_memory<refreekv::kept_positions<>> {
 public:
  decision_memory(index_t kv_heads, index_t tokens)
      : kv_heads_(kv_heads),
        tokens_(tokens),
        positions_(static_cast<std::size_t>(kv_heads * tokens)),
        counts_(static_cast<std::size_t>(kv_heads)) {}
  refreekv::kept_positions<> kept() {
    return {{positions_.data(), {1, kv_heads_, tokens_}}, {counts_.data(), {1, kv_heads_}}};
  }
  refreekv::kept_positions<> decided() { return kept(); }
  double fraction() const { return counts_[0].kept_fraction(); }

 private:
  index_t kv_heads_, tokens_;
  std::vector<refreekv::position_t> positions_;
  std::vector<refreekv::kept_tokens> counts_;
};

template <>
class decision_memory<refreekv::kept_with_stand_ins<>> {
 public:
  decision_memory(index_t kv_heads, index_t tokens, index_t stand_ins = 0, index_t head_dim = 0)
      : positions_(kv_heads, tokens),
        kv_heads_(kv_heads),
        stand_ins_(stand_ins),
        head_dim_(head_dim),
        rows_(static_cast<std::size_t>(2 * kv_heads * stand_ins * head_dim)),
        counts_(static_cast<std::size_t>(kv_heads)) {}
  refreekv::kept_with_stand_ins<> kept() {
    if (stand_ins_ == 0) return positions_.kept();
    const index_t half = kv_heads_ * stand_ins_ * head_dim_;
    return {positions_.kept(),
            {{rows_.data(), {1, kv_heads_, stand_ins_, head_dim_}},
             {rows_.data() + half, {1, kv_heads_, stand_ins_, head_dim_}},
             {counts_.data(), {1, kv_heads_}}}};
  }
  refreekv::kept_with_stand_ins<> decided() { return kept(); }
  /// Of all KV heads, each of which keeps its own number.
  double fraction() {
    double sum = 0;
    for (index_t h = 0; h < kv_heads_; ++h) {
      sum += static_cast<double>(kept().length(0, h)) / positions_.kept().counts(0, h).tokens;
    }
    return sum / static_cast<double>(kv_heads_);
  }

 private:
  decision_memory<refreekv::kept_positions<>> positions_;
  index_t kv_heads_, stand_ins_, head_dim_;
  std::vector<float> rows_;
  std::vector<refreekv::position_t> counts_;
};

/// What a policy wants to see of a layer.
template <class Policy, class T>
auto layer_for(const Policy&, const synthetic_layer<T>& layer) {
  if constexpr (std::same_as<Policy, refreekv::policy::faithful>) {
    return refreekv::with_values(layer.model_layer(layer.keys()), layer.values());
  } else {
    return layer.model_layer(layer.keys());
  }
}

template <class Policy, class T>
auto decision_of_layer(const Policy& policy, const synthetic_layer<T>& layer) {
  const index_t kv_heads = layer.shape().kv_heads;
  using memory = decision_memory<refreekv::decision_of<Policy, refreekv::host_memory>>;
  if constexpr (requires { policy.most_stand_ins(layer.tokens()); }) {
    return memory(kv_heads, layer.tokens(), policy.most_stand_ins(layer.tokens()),
                  layer.shape().head_dim);
  } else {
    return memory(kv_heads, layer.tokens());
  }
}

}  // namespace bench
