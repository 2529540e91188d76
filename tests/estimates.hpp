// SPDX-License-Identifier: Apache-2.0
// Owns the memory of 4-bit keys and page bounds, as a caller of Twilight does.
#pragma once

#include "layouts.hpp"

/// Memory for the 4-bit keys and page bounds of `keys`; the library fills it. Elements start as
/// 0xA5 or NaN, which shows unwritten ones.
class estimates {
 public:
  template <class Keys>
  estimates(const Keys& keys, std::vector<position_t> lengths, index_t page_tokens,
            bool centred = false)
      : lengths_(std::move(lengths)),
        heads_(keys.shape().kv_heads),
        capacity_(keys.shape().capacity + 2),
        dims_(keys.shape().head_dim),
        page_tokens_(page_tokens),
        codes_(size(rows() * bytes()), std::uint8_t{0xA5}),
        ranges_(size(rows() * 2), std::numeric_limits<float>::quiet_NaN()),
        bounds_(size(count() * heads_ * pages() * 2 * dims_),
                std::numeric_limits<float>::quiet_NaN()),
        centres_(size(centred ? count() * heads_ * dims_ : 0),
                 std::numeric_limits<float>::quiet_NaN()) {}

  refreekv::int4_keys<> keys() {
    return {.codes = {codes_.data(), {count(), heads_, capacity_, bytes()}},
            .ranges = {ranges_.data(), {count(), heads_, capacity_, 2}},
            .dims = dims_,
            .lengths = {lengths_.data(), {count()}},
            .centres = centres()};
  }
  refreekv::page_bounds<> page_bounds() {
    return {.bounds = {bounds_.data(), {count(), heads_, pages(), 2, dims_}},
            .page_tokens = page_tokens_};
  }
  /// [sequence, kv_head, head_dim]; empty unless `centred`.
  refreekv::view<float, 3> centres() {
    if (centres_.empty()) return {};
    return {centres_.data(), {count(), heads_, dims_}};
  }
  int code(index_t s, index_t h, index_t t, index_t d) {
    const int pair = keys().codes(s, h, t, d / 2);
    return d % 2 == 0 ? pair & 15 : pair >> 4;
  }
  /// A key, decoded from its 4-bit codes.
  std::vector<double> key(index_t s, index_t h, index_t t) {
    std::vector<double> out;
    const auto ranges = keys().ranges;
    for (index_t d = 0; d < dims_; ++d) {
      out.push_back(double{ranges(s, h, t, 0)} + double{ranges(s, h, t, 1)} * code(s, h, t, d) +
                    (centres_.empty() ? 0 : double{centres()(s, h, d)}));
    }
    return out;
  }
  bool same_as(const estimates& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
        return x == y || (std::isnan(x) && std::isnan(y));
      });
    };
    return codes_ == other.codes_ && same(ranges_, other.ranges_) && same(bounds_, other.bounds_) &&
           same(centres_, other.centres_);
  }

 private:
  index_t count() const { return static_cast<index_t>(lengths_.size()); }
  index_t rows() const { return count() * heads_ * capacity_; }
  index_t bytes() const { return (dims_ + 1) / 2; }
  index_t pages() const { return (capacity_ + page_tokens_ - 1) / page_tokens_; }

  std::vector<position_t> lengths_;
  index_t heads_, capacity_, dims_, page_tokens_;
  std::vector<std::uint8_t> codes_;
  std::vector<float> ranges_, bounds_, centres_;
};
