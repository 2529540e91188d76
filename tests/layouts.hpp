// SPDX-License-Identifier: Apache-2.0
// Caches of every layout and element type, filled from plain rows. All other memory is NaN, so a
// read outside the rows shows in the result, and `untouched` finds a write outside them.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>

#include "problem.hpp"

template <class T>
T to_element(float x) {
  if constexpr (std::is_same_v<T, refreekv::bf16_bits>) {
    return {Eigen::numext::bit_cast<std::uint16_t>(Eigen::bfloat16(x))};
  } else if constexpr (std::is_same_v<T, refreekv::f16_bits>) {
    return {Eigen::numext::bit_cast<std::uint16_t>(Eigen::half(x))};
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
float to_float(T x) {
  if constexpr (std::is_same_v<T, refreekv::bf16_bits>) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::bfloat16>(x.bits));
  } else if constexpr (std::is_same_v<T, refreekv::f16_bits>) {
    return static_cast<float>(Eigen::numext::bit_cast<Eigen::half>(x.bits));
  } else {
    return static_cast<float>(x);
  }
}

/// Rounds values to an element type, so that the oracle reads the numbers that the cache holds.
template <class T>
void round_to(std::vector<float>& values) {
  for (float& v : values) v = to_float(to_element<T>(v));
}

template <class T>
void round_problem(problem& p) {
  round_to<T>(p.queries);
  for (auto& values : p.keys.values) round_to<T>(values);
}

inline std::size_t size(index_t n) { return static_cast<std::size_t>(n); }

/// Storage that records which of its elements belong to rows.
template <class T>
class canary_buffer {
 public:
  explicit canary_buffer(index_t elements)
      : data_(size(elements), to_element<T>(std::numeric_limits<float>::quiet_NaN())),
        is_row_(size(elements), false) {}

  T* data() { return data_.data(); }

  template <class Source>
  void fill(const Source& source, const plain_rows& rows) {
    for (index_t s = 0; s < rows.sequences(); ++s) {
      for (index_t h = 0; h < rows.kv_heads; ++h) {
        for (index_t t = 0; t < rows.lengths[size(s)]; ++t) {
          const auto run = source.run_at(s, h, t);
          for (index_t d = 0; d < rows.head_dim; ++d) {
            T* element = run.data + d * run.dim_stride;
            *element = to_element<T>(rows.at(s, h, t, d));
            is_row_[size(element - data_.data())] = true;
          }
        }
      }
    }
  }
  bool untouched() const {
    for (std::size_t i = 0; i < data_.size(); ++i) {
      if (!is_row_[i] && !std::isnan(to_float(data_[i]))) return false;
    }
    return true;
  }

 private:
  std::vector<T> data_;
  std::vector<char> is_row_;
};

enum class axis_order { head_token_dim, token_head_dim, head_dim_token };

template <class T>
class dense_cache {
 public:
  explicit dense_cache(const plain_rows& rows, axis_order order = axis_order::head_token_dim,
                       index_t padding = 3)
      : lengths_(rows.lengths),
        capacity_(rows.longest() + padding),
        buffer_(rows.sequences() * (rows.kv_heads + 1) * capacity_ * (rows.head_dim + padding) +
                1) {
    const index_t heads = rows.kv_heads, dim = rows.head_dim + padding;
    // [sequence, kv_head, token, head_dim] strides
    std::array<index_t, 4> stride{};
    switch (order) {
      case axis_order::head_token_dim:
        stride = {heads * capacity_ * dim, capacity_ * dim, dim, 1};
        break;
      case axis_order::token_head_dim:
        stride = {heads * capacity_ * dim, dim, heads * dim, 1};
        break;
      case axis_order::head_dim_token:
        stride = {heads * capacity_ * dim, capacity_ * dim, 1, capacity_};
        break;
    }
    rows_ = {buffer_.data(),
             {rows.sequences(), heads, capacity_, rows.head_dim},
             {stride[0], stride[1], stride[2], stride[3]}};
    buffer_.fill(source(), rows);
  }
  auto source() const {
    return refreekv::dense<T>(rows_, {lengths_.data(), {static_cast<index_t>(lengths_.size())}});
  }
  bool untouched() const { return buffer_.untouched(); }

 private:
  std::vector<position_t> lengths_;
  index_t capacity_;
  canary_buffer<T> buffer_;
  refreekv::view<T, 4> rows_;
};

/// A pool of pages in random order, some of them spare. With `by_pointer` each page has its own
/// address; with `ragged` the page tables of all sequences are one list.
template <class T, class Index = std::int32_t>
class paged_cache {
 public:
  paged_cache(const plain_rows& rows, index_t page_tokens, bool by_pointer = false,
              bool ragged = false, bool heads_first = true, unsigned seed = 1)
      : lengths_(rows.lengths),
        page_tokens_(page_tokens),
        by_pointer_(by_pointer),
        ragged_(ragged),
        max_pages_(rows.longest() / page_tokens + 2),
        pages_(rows.sequences() * max_pages_ + 5),
        buffer_(pages_ * rows.kv_heads * page_tokens * (rows.head_dim + 2)) {
    std::vector<Index> ids(size(pages_));
    std::iota(ids.begin(), ids.end(), Index{0});
    std::shuffle(ids.begin(), ids.end(), std::mt19937(seed));
    offsets_ = {0};
    index_t next = 0;
    for (const position_t n : lengths_) {
      const index_t used = (n + page_tokens - 1) / page_tokens;
      for (index_t p = 0; p < (ragged ? used : max_pages_); ++p) {
        table_.push_back(p < used ? ids[size(next++)] : Index{-1});
      }
      offsets_.push_back(static_cast<Index>(table_.size()));
      last_.push_back(static_cast<position_t>(n - (used - 1) * page_tokens));
    }
    const index_t dim = rows.head_dim + 2, heads = rows.kv_heads;
    pool_ = heads_first
                ? refreekv::view<T, 4>(buffer_.data(), {pages_, heads, page_tokens, rows.head_dim},
                                       {heads * page_tokens * dim, page_tokens * dim, dim, 1})
                : refreekv::view<T, 4>(buffer_.data(), {pages_, heads, page_tokens, rows.head_dim},
                                       {heads * page_tokens * dim, dim, heads * dim, 1});
    for (index_t p = 0; p < pages_; ++p) pointers_.push_back(pool_.at(p));
    buffer_.fill(source(), rows);
  }
  auto source() const {
    const auto sequences = static_cast<index_t>(lengths_.size());
    using table = refreekv::page_table<Index>;
    const table ids = ragged_
                          ? table::ragged({table_.data(), {static_cast<index_t>(table_.size())}},
                                          {offsets_.data(), {sequences + 1}},
                                          {last_.data(), {sequences}}, max_pages_)
                          : table::padded({table_.data(), {sequences, max_pages_}},
                                          {lengths_.data(), {sequences}});
    if (!by_pointer_) return refreekv::paged<T, Index>(pool_, ids);
    const refreekv::view<T, 3> page(nullptr, {pool_.extent(1), pool_.extent(2), pool_.extent(3)},
                                    {pool_.stride(1), pool_.stride(2), pool_.stride(3)});
    return refreekv::paged<T, Index>(refreekv::view<T* const, 1>(pointers_.data(), {pages_}), page,
                                     ids);
  }
  bool untouched() const { return buffer_.untouched(); }
  const std::vector<Index>& table() const { return table_; }
  index_t max_pages() const { return max_pages_; }

 private:
  std::vector<position_t> lengths_, last_;
  index_t page_tokens_;
  bool by_pointer_, ragged_;
  index_t max_pages_, pages_;
  canary_buffer<T> buffer_;
  std::vector<Index> table_, offsets_;
  std::vector<T*> pointers_;
  refreekv::view<T, 4> pool_;
};

/// Three segments per sequence: four tokens at the start, then a ring that has wrapped.
template <class T>
class segmented_cache {
 public:
  explicit segmented_cache(const plain_rows& rows, unsigned seed = 1)
      : capacity_(rows.longest() + 7),
        buffer_(rows.sequences() * rows.kv_heads * capacity_ * rows.head_dim) {
    random_source random(seed);
    for (const position_t n : rows.lengths) {
      const auto first = static_cast<position_t>(std::min<index_t>(n, 4));
      const auto left = static_cast<position_t>(n - first);
      const auto wrapped = static_cast<position_t>(random.between(0, left));
      segments_.push_back({0, first});
      segments_.push_back({static_cast<position_t>(capacity_ - (left - wrapped)),
                           static_cast<position_t>(left - wrapped)});
      segments_.push_back({first, wrapped});
    }
    slots_ = {buffer_.data(), {rows.sequences(), rows.kv_heads, capacity_, rows.head_dim}};
    buffer_.fill(source(), rows);
  }
  auto source() const {
    return refreekv::segmented<T>(
        slots_, {segments_.data(), {static_cast<index_t>(segments_.size()) / 3, 3}});
  }
  bool untouched() const { return buffer_.untouched(); }

 private:
  index_t capacity_;
  canary_buffer<T> buffer_;
  std::vector<refreekv::segment> segments_;
  refreekv::view<T, 4> slots_;
};

#if defined(__CUDACC__)

/// Device code cannot call virtual functions of the host, so there each layout is compiled.
template <class Cache>
Cache any_layout(Cache cache) {
  return cache;
}

#else

/// A cache of any layout behind virtual functions. The library only asks a source for its sizes and
/// for runs of rows, so a test with all layouts is compiled once.
template <class T>
class any_cache {
  struct layout {
    virtual ~layout() = default;
    virtual refreekv::cache_shape shape() const noexcept = 0;
    virtual index_t tokens(index_t s) const noexcept = 0;
    virtual const char* invalid() const noexcept = 0;
    virtual refreekv::token_run<T> run_at(index_t s, index_t h, index_t t) const noexcept = 0;
    virtual bool untouched() const = 0;
  };

  template <class Cache>
  struct layout_of final : layout {
    Cache cache;
    decltype(cache.source()) source = cache.source();

    explicit layout_of(Cache c) : cache(std::move(c)) {}
    refreekv::cache_shape shape() const noexcept override { return source.shape(); }
    index_t tokens(index_t s) const noexcept override { return source.tokens(s); }
    const char* invalid() const noexcept override { return source.invalid(); }
    refreekv::token_run<T> run_at(index_t s, index_t h, index_t t) const noexcept override {
      return source.run_at(s, h, t);
    }
    bool untouched() const override { return cache.untouched(); }
  };

 public:
  class source_type {
   public:
    using element_type = T;
    using memory = refreekv::host_memory;

    explicit source_type(const layout* of) : of_(of) {}
    refreekv::cache_shape shape() const noexcept { return of_->shape(); }
    index_t tokens(index_t s) const noexcept { return of_->tokens(s); }
    const char* invalid() const noexcept { return of_->invalid(); }
    refreekv::token_run<T> run_at(index_t s, index_t h, index_t t) const noexcept {
      return of_->run_at(s, h, t);
    }

   private:
    const layout* of_;
  };

  template <class Cache>
  explicit any_cache(Cache cache)
      : layout_(std::make_unique<layout_of<Cache> >(std::move(cache))) {}
  source_type source() const { return source_type(layout_.get()); }
  bool untouched() const { return layout_->untouched(); }

 private:
  std::unique_ptr<const layout> layout_;
};

template <class Cache>
auto any_layout(Cache cache) {
  return any_cache<typename decltype(cache.source())::element_type>(std::move(cache));
}

#endif

inline constexpr std::size_t layout_kinds = 7;

/// Calls f(name, cache) for a cache of layout i, in [0, layout_kinds).
template <class T, class F>
void with_layout(std::size_t i, const plain_rows& rows, const F& f) {
  const auto call = [&](const char* name, auto cache) { f(name, any_layout(std::move(cache))); };
  switch (i) {
    case 0: return call("dense [kv_head, token, dim]", dense_cache<T>(rows));
    case 1:
      return call("dense [token, kv_head, dim]", dense_cache<T>(rows, axis_order::token_head_dim));
    case 2:
      return call("dense [kv_head, dim, token]", dense_cache<T>(rows, axis_order::head_dim_token));
    case 3: return call("pages of 1", paged_cache<T, std::int32_t>(rows, 1));
    case 4:
      return call("pages of 16, pointers, ragged table",
                  paged_cache<T, std::int32_t>(rows, 16, true, true, false));
    case 5: return call("pages of 64, int64 ids", paged_cache<T, std::int64_t>(rows, 64));
    default: return call("segmented", segmented_cache<T>(rows));
  }
}

/// Calls f(name, cache) for one cache of each layout.
template <class T, class F>
void for_each_layout(const plain_rows& rows, const F& f) {
  for (std::size_t i = 0; i < layout_kinds; ++i) with_layout<T>(i, rows, f);
}
