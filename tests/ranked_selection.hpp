// SPDX-License-Identifier: Apache-2.0
// Runs select of a policy that keeps single tokens, in a workspace of exactly workspace_size.
#pragma once

#include "catch.hpp"
#include "layouts.hpp"
#include "reference.hpp"
#include "test_backend.hpp"

struct ranked_selection {
  refreekv::status status;
  index_t kv_heads = 0;
  std::vector<refreekv::kept_tokens> counts;  // [sequence, kv_head]
  std::vector<std::vector<position_t>> kept;  // [sequence, kv_head]

  const std::vector<position_t>& at(index_t sequence, index_t kv_head = 0) const {
    return kept[size(sequence * kv_heads + kv_head)];
  }
  friend bool operator==(const ranked_selection& a, const ranked_selection& b) {
    return a.status == b.status && a.counts == b.counts && a.kept == b.kept;
  }
};

/// Memory with canaries around its middle, which must not change.
class guarded_bytes {
 public:
  explicit guarded_bytes(std::size_t bytes) : bytes_(bytes), memory_(bytes + 2 * margin, canary) {}

  refreekv::workspace<> middle() { return {memory_.data() + start, bytes_}; }
  bool intact() const {
    const auto is_canary = [](std::byte b) { return b == canary; };
    return std::all_of(memory_.data(), memory_.data() + start, is_canary) &&
           std::all_of(memory_.data() + start + bytes_, memory_.data() + memory_.size(), is_canary);
  }

 private:
  static constexpr std::size_t margin = 64, start = margin + 1;  // odd: unaligned on purpose
  static constexpr auto canary = std::byte{0xA5};

  std::size_t bytes_;
  std::vector<std::byte> memory_;
};

/// Positions and counts, with canaries between their rows, which must not change.
class guarded_positions {
 public:
  guarded_positions(index_t sequences, index_t kv_heads, index_t capacity)
      : sequences_(sequences),
        kv_heads_(kv_heads),
        capacity_(capacity),
        positions_(size((sequences * kv_heads + 1) * stride()), untouched),
        counts_(size(sequences * kv_heads + 2), untouched_count) {}

  refreekv::kept_positions<> kept() {
    return {{positions_.data() + gap,
             {sequences_, kv_heads_, capacity_},
             {kv_heads_ * stride(), stride(), 1}},
            {counts_.data() + 1, {sequences_, kv_heads_}}};
  }
  bool intact() const {
    for (std::size_t i = 0; i < positions_.size(); ++i) {
      const bool inside = static_cast<index_t>(i) % stride() >= gap &&
                          static_cast<index_t>(i) < sequences_ * kv_heads_ * stride();
      if (!inside && positions_[i] != untouched) return false;
    }
    return counts_.front() == untouched_count && counts_.back() == untouched_count;
  }
  bool unwritten() const {
    return std::all_of(positions_.begin(), positions_.end(),
                       [](position_t p) { return p == untouched; }) &&
           std::all_of(counts_.begin(), counts_.end(),
                       [](const auto& c) { return c == untouched_count; });
  }

 private:
  static constexpr index_t gap = 3;
  static constexpr position_t untouched = -7;
  static constexpr refreekv::kept_tokens untouched_count{-7, -7};

  index_t stride() const { return capacity_ + gap; }

  index_t sequences_, kv_heads_, capacity_;
  std::vector<position_t> positions_;
  std::vector<refreekv::kept_tokens> counts_;
};

inline std::vector<position_t> positions_of(const refreekv::kept_positions<>& kept, index_t s,
                                            index_t h) {
  std::vector<position_t> out;
  for (index_t i = 0; i < kept.counts(s, h).count; ++i) out.push_back(kept.positions(s, h, i));
  return out;
}

/// Runs select between canaries. Returns whether it wrote a decision. The workspace has `missing`
/// bytes less than workspace_size.
template <class Policy, class Backend, class Layer, class Guarded>
bool run_guarded(const Policy& policy, const Backend& backend, const Layer& layer, Guarded& guarded,
                 std::size_t missing, ranked_selection& out) {
  guarded_bytes memory(refreekv::workspace_size(policy, backend, layer) - missing);
  out.status = refreekv::select(policy, backend, layer, guarded.kept(), memory.middle());
  out.kv_heads = layer.kv_heads();
  REQUIRE(memory.intact());
  REQUIRE(guarded.intact());
  if (out.status == refreekv::status::ok) return true;
  REQUIRE(guarded.unwritten());
  return false;
}

/// Appends a head's count and positions.
template <class Layer>
void append(const refreekv::kept_positions<>& kept, const Layer& layer, index_t s, index_t h,
            ranked_selection& out) {
  const refreekv::kept_tokens& count = kept.counts(s, h);
  out.counts.push_back(count);
  REQUIRE(count.tokens == layer.tokens(s));
  REQUIRE(count.count >= 0);
  REQUIRE(count.count <= layer.tokens(s));
  out.kept.push_back(positions_of(kept, s, h));
}

/// Runs select and checks the canaries. The workspace has `missing` bytes less than workspace_size.
template <class Policy, class Backend, class Layer>
ranked_selection run_ranked(const Policy& policy, const Backend& backend, const Layer& layer,
                            std::size_t missing = 0) {
  guarded_positions guarded(layer.sequences(), layer.kv_heads(), layer.capacity());
  ranked_selection out;
  if (!run_guarded(policy, backend, layer, guarded, missing, out)) return out;
  for (index_t s = 0; s < layer.sequences(); ++s) {
    for (index_t h = 0; h < layer.kv_heads(); ++h) append(guarded.kept(), layer, s, h, out);
  }
  return out;
}

/// Ready attention rows as an engine has them, [sequence, row, q_head, token]. Tokens that a row
/// does not see are NaN.
class row_tensor {
 public:
  row_tensor(const std::vector<reference::attention_rows>& sequences, index_t window,
             index_t padding = 2)
      : window_(window) {
    index_t longest = 0;
    for (const auto& rows : sequences) {
      lengths_.push_back(static_cast<position_t>(rows.tokens));
      longest = std::max(longest, rows.tokens);
      q_heads_ = rows.q_heads;
    }
    tokens_ = longest + padding;
    values_.assign(size(count() * window * q_heads_ * tokens_),
                   std::numeric_limits<float>::quiet_NaN());
    for (index_t s = 0; s < count(); ++s) fill(s, sequences[size(s)]);
  }

  refreekv::view<const float, 4> rows() const {
    return {values_.data(), {count(), window_, q_heads_, tokens_}};
  }
  auto layer(index_t kv_heads, const refreekv::layer_info<>& info = {}) const {
    return refreekv::observe_rows(rows(), kv_heads, {lengths_.data(), {count()}}, info);
  }

 private:
  index_t count() const { return static_cast<index_t>(lengths_.size()); }
  void fill(index_t s, const reference::attention_rows& from) {
    const refreekv::view<float, 4> to(values_.data(), {count(), window_, q_heads_, tokens_});
    for (index_t r = 0; r < window_; ++r) {
      const index_t row = from.window - window_ + r;
      for (index_t h = 0; h < q_heads_; ++h) {
        for (index_t t = 0; t < from.tokens; ++t) {
          if (row < 0 || from.sees(row, t)) {
            to(s, r, h, t) = row < 0 ? 0 : static_cast<float>(from.at(h, row, t));
          }
        }
      }
    }
  }

  index_t window_, q_heads_ = 1, tokens_ = 0;
  std::vector<position_t> lengths_;
  std::vector<float> values_;
};
