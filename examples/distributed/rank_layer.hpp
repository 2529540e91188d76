// SPDX-License-Identifier: Apache-2.0
// One rank's part of a layer: its tensors, the decision, and what is left of them.
#pragma once

#include <cstring>
#include <refreekv/compact.hpp>
#include <refreekv/local_ranges.hpp>
#include <refreekv/policy/refreekv.hpp>
#include <refreekv/select.hpp>
#include <stdexcept>

#include "deployment.hpp"
#include "synthetic_layer.hpp"

namespace distributed {

// Device: where a rank's tensors are and work runs.
// - `memory`, `backend`: the library's.
// - `array<T>`: made from a std::vector<T>; has data() and download().
// - `wait()`: until all work is done. Throws if it went wrong.
template <class Device>
class rank_layer {
 public:
  template <class T>
  using array = typename Device::template array<T>;
  using memory = typename Device::memory;

  // The last `window` queries, and all keys and values of the part.
  rank_layer(const Device& device, const synthetic_layer& layer, const rank_part& part,
             index_t window)
      : device_(device),
        layer_(layer),
        part_(part),
        window_(window),
        keys_(rows(&synthetic_layer::key)),
        values_(rows(&synthetic_layer::value)),
        queries_(last_queries()),
        parts_(part.tokens),
        total_(std::vector{static_cast<refreekv::position_t>(layer.tokens())}),
        kept_(std::vector<refreekv::kept_range>(1)) {}

  // A decision about heads, whose link sums; on one rank refreekv::single_rank.
  template <class Link>
  refreekv::kept_range select_heads(const refreekv::policy::refreekv& policy, const Link& link) {
    return select_from(policy, source(keys_), link, [&] { return refreekv::status::ok; });
  }
  // One about tokens, whose link exchanges. Keys are counted along the whole sequence, and what is
  // kept of it is then translated to what is kept here.
  template <class Link>
  refreekv::kept_range select_tokens(const refreekv::policy::refreekv& policy, const Link& link) {
    const auto parts = static_cast<index_t>(part_.tokens.size());
    const refreekv::shard keys(
        source(keys_),
        refreekv::view<const refreekv::token_range, 2, memory>(parts_.data(), {1, parts}),
        refreekv::lengths_view<memory>(total_.data(), {1}), layer_.tokens());
    return select_from(policy, keys, link, [&] {
      return refreekv::local_ranges(device_.backend, keys, cut(), {kept_.data(), {1, 1}});
    });
  }

  // Moves what is kept together. Returns how many tokens that are here.
  index_t compact() {
    check(refreekv::compact(device_.backend, cut(), refreekv::compaction::sinks_up, source(keys_),
                            source(values_)));
    device_.wait();
    local_kept_ = kept_.download()[0];
    return local_kept_.length();
  }

  // After compact: whether the slots hold the rows of exactly those tokens that `all`, a decision
  // about the whole sequence, keeps of this part.
  bool holds(const refreekv::kept_range& all) const {
    return holds(keys_, all, &synthetic_layer::key) && holds(values_, all, &synthetic_layer::value);
  }

  // Of the keys and values of that many tokens.
  index_t bytes_of(index_t tokens) const {
    return 2 * part_.kv_heads * tokens * layer_.shape().head_dim * index_t{sizeof(element)};
  }

 private:
  static void check(refreekv::status s) {
    if (s != refreekv::status::ok) throw std::runtime_error(refreekv::to_string(s));
  }

  template <class F>
  void for_each_token(const F& f) const {
    for (const auto& [begin, end] : part_.tokens) {
      for (index_t t = begin; t < end; ++t) f(t);
    }
  }
  using row_of = void (synthetic_layer::*)(index_t, index_t, element*) const;

  // [kv_head, token, head_dim]
  std::vector<element> rows(row_of make) const {
    const index_t dim = layer_.shape().head_dim;
    std::vector<element> out(static_cast<std::size_t>(part_.kv_heads * part_.token_count() * dim));
    element* row = out.data();
    for (index_t h = part_.kv_head; h < part_.kv_head + part_.kv_heads; ++h) {
      for_each_token([&](index_t t) {
        (layer_.*make)(h, t, row);
        row += dim;
      });
    }
    return out;
  }
  bool holds(const array<element>& rows, const refreekv::kept_range& all, row_of make) const {
    const auto dim = static_cast<std::size_t>(layer_.shape().head_dim);
    const std::vector<element> stored = rows.download();
    std::vector<element> expected(dim);
    const element* end = stored.data();  // of the head's slots, the last of which are in use
    bool equal = true;
    for (index_t h = part_.kv_head; h < part_.kv_head + part_.kv_heads; ++h) {
      end += part_.token_count() * layer_.shape().head_dim;
      const element* row = end - local_kept_.length() * layer_.shape().head_dim;
      for_each_token([&](index_t t) {
        if (!all.keeps(t)) return;
        (layer_.*make)(h, t, expected.data());
        equal = equal && row < end && std::memcmp(row, expected.data(), dim * sizeof(element)) == 0;
        row += dim;
      });
      equal = equal && row == end;
    }
    return equal;
  }
  // [window, q_head, head_dim]
  std::vector<element> last_queries() const {
    const index_t dim = layer_.shape().head_dim;
    std::vector<element> out(static_cast<std::size_t>(window_ * part_.q_heads * dim));
    element* row = out.data();
    for (index_t age = window_ - 1; age >= 0; --age) {
      for (index_t h = part_.q_head; h < part_.q_head + part_.q_heads; ++h, row += dim) {
        layer_.query(age, h, row);
      }
    }
    return out;
  }

  auto source(array<element>& rows) const {
    return refreekv::dense(refreekv::view<element, 4, memory>(
        rows.data(), {1, part_.kv_heads, part_.token_count(), layer_.shape().head_dim}));
  }
  refreekv::view<const refreekv::kept_range, 2, memory> cut() const {
    return {kept_.data(), {1, 1}};
  }

  template <class Keys, class Link, class Localise>
  refreekv::kept_range select_from(const refreekv::policy::refreekv& policy, const Keys& keys,
                                   const Link& link, const Localise& localise) {
    const refreekv::view<const element, 4, memory> queries(
        queries_.data(), {1, window_, part_.q_heads, layer_.shape().head_dim});
    const auto layer = refreekv::observe(queries, keys, {.index = layer_.number()});
    const refreekv::kept_ranges<memory> kept(kept_.data(), {1, 1});
    if (const char* reason = refreekv::why_invalid(policy, layer, kept)) {
      throw std::runtime_error(reason);
    }
    array<std::byte> scratch{
        std::vector<std::byte>(refreekv::workspace_size(policy, device_.backend, layer))};
    const refreekv::workspace<memory> room(
        scratch.data(), refreekv::workspace_size(policy, device_.backend, layer));
    check(refreekv::select(policy, device_.backend, layer, kept, room, link));
    device_.wait();
    const refreekv::kept_range all = kept_.download()[0];
    check(localise());
    return all;
  }

  const Device& device_;
  const synthetic_layer& layer_;
  rank_part part_;
  index_t window_;
  array<element> keys_, values_, queries_;
  array<refreekv::token_range> parts_;
  array<refreekv::position_t> total_;
  array<refreekv::kept_range> kept_;
  refreekv::kept_range local_kept_;
};

}  // namespace distributed
