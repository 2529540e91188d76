// SPDX-License-Identifier: Apache-2.0
// A layer that is measured on the CPU.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <span>
#include <vector>

#include "geometry.hpp"
#include "refreekv/refreekv.hpp"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bench {

/// An array in huge pages where there are any: with small ones, chance decides which of them share
/// a place in the caches, and every run measures something else.
template <class T>
class array {
 public:
  explicit array(index_t count) : count_(static_cast<std::size_t>(count)) {
    constexpr std::size_t page = std::size_t{2} << 20;
    const std::size_t size = (count_ * sizeof(T) / page + 1) * page;
    void* memory = std::aligned_alloc(page, size);
    if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    data_.reset(static_cast<T*>(memory));
  }
  T* begin() const { return data_.get(); }
  T* end() const { return data_.get() + count_; }
  std::span<const std::byte> bytes() const {
    return std::as_bytes(std::span<const T>(begin(), count_));
  }

 private:
  struct release {
    void operator()(T* data) const { std::free(data); }
  };
  std::size_t count_;
  std::unique_ptr<T[], release> data_;
};

/// One layer of one sequence, keys and values [1, kv_head, token, head_dim] and the last queries
/// [1, window, q_head, head_dim], filled with noise: attention is spread out, so about 2 % are
/// dropped and what is measured is the decision.
template <class T>
class synthetic_layer {
 public:
  /// `value_tokens`: 0 where values have no part in it.
  synthetic_layer(const geometry& g, index_t tokens, index_t value_tokens = 0, index_t window = 1)
      : geometry_(g),
        tokens_(tokens),
        keys_(g.kv_heads * tokens * g.head_dim),
        values_(g.kv_heads * value_tokens * g.head_dim),
        window_(window),
        query_(window * g.q_heads * g.head_dim) {
    for (T& x : keys_) x = T(1.7f * noise());
    for (T& x : values_) x = T(noise());
    for (T& x : query_) x = T(noise());
  }

  refreekv::dense<T> keys() const { return source(keys_); }
  refreekv::dense<T> values() const { return source(values_); }

  /// The same memory as pages [page, kv_head, slot, head_dim] of 16 tokens, in a shuffled order.
  refreekv::paged<T> pages() {
    constexpr index_t slots = 16;
    const index_t count = tokens_ / slots;
    page_ids_.resize(static_cast<std::size_t>(count));
    std::iota(page_ids_.begin(), page_ids_.end(), 0);
    for (std::size_t i = page_ids_.size(); i > 1; --i) {
      std::swap(page_ids_[i - 1], page_ids_[next() % i]);
    }
    length_ = static_cast<refreekv::position_t>(tokens_);
    return {refreekv::view(keys_.begin(), {count, geometry_.kv_heads, slots, geometry_.head_dim}),
            refreekv::page_table<std::int32_t>::padded({page_ids_.data(), {1, count}},
                                                       {&length_, {1}})};
  }

  template <class Keys>
  auto model_layer(const Keys& keys) const {
    return refreekv::observe(
        refreekv::view(query_.begin(), {1, window_, geometry_.q_heads, geometry_.head_dim}), keys,
        {.index = 2});
  }

  const geometry& shape() const { return geometry_; }
  index_t tokens() const { return tokens_; }
  const T* query() const { return query_.begin(); }
  const T* key_data() const { return keys_.begin(); }
  std::span<const std::byte> key_bytes() const { return keys_.bytes(); }

 private:
  refreekv::dense<T> source(const array<T>& rows) const {
    return refreekv::dense(
        refreekv::view(rows.begin(), {1, geometry_.kv_heads, tokens_, geometry_.head_dim}));
  }
  /// xorshift: millions of numbers, quickly and the same everywhere.
  std::uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  /// In [-1, 1).
  float noise() { return static_cast<float>(static_cast<std::int32_t>(next() >> 32)) * 0x1p-31f; }

  geometry geometry_;
  index_t tokens_;
  array<T> keys_, values_;
  index_t window_;
  array<T> query_;
  std::vector<std::int32_t> page_ids_;
  refreekv::position_t length_ = 0;
  std::uint64_t state_ = 88172645463325252u;
};

}  // namespace bench
