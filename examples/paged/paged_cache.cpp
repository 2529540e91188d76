// SPDX-License-Identifier: Apache-2.0
#include "paged_cache.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace paged {

paged_layer::paged_layer(page_pool& pool, std::vector<block_id> table, std::size_t tokens)
    : pool_(&pool), table_(std::move(table)) {
  slots_.tokens = static_cast<refreekv::position_t>(tokens);
}

paged_layer::paged_layer(paged_layer&& other) noexcept
    : pool_(other.pool_), table_(std::exchange(other.table_, {})), slots_(other.slots_) {}

paged_layer::~paged_layer() {
  for (const block_id page : table_) pool_->manager.release(page);
}

smollm2::kv_rows paged_layer::rows_from(std::size_t kv_head, std::size_t row) const {
  const auto sinks = static_cast<std::size_t>(slots_.sinks);
  const std::size_t end = row < sinks ? sinks : length(kv_head);
  const auto slot = static_cast<refreekv::index_t>(row) + (row < sinks ? 0 : slots_.dropped());
  const auto head = static_cast<refreekv::index_t>(kv_head);
  const auto [keys, values] = rows();
  const auto run = keys.run_at(0, head, slot);
  return {run.data, values.run_at(0, head, slot).data,
          std::min(static_cast<std::size_t>(run.tokens), end - row)};
}

void paged_layer::reserve(std::size_t tokens) {
  const std::size_t slots = table_.size() * pool_->shape().tokens;
  if (tokens > slots - static_cast<std::size_t>(slots_.tokens)) {
    throw std::length_error("a page table of " + std::to_string(slots) + " slots is full");
  }
}

void paged_layer::append(std::span<const float> keys, std::span<const float> values) {
  const std::size_t row = kv_heads() * head_dim();
  const std::size_t tokens = keys.size() / row;
  reserve(tokens);
  const auto first = static_cast<std::size_t>(slots_.tokens);
  const page_shape& shape = pool_->shape();
  for (std::size_t page = first / shape.tokens; page < shape.pages_for(first + tokens); ++page) {
    if (pool_->manager.owners(table_[page]) != 1) {
      throw std::logic_error("a page that several sequences own must not be written");
    }
  }

  slots_.tokens += static_cast<refreekv::position_t>(tokens);
  const auto [key_rows, value_rows] = rows();
  for (std::size_t token = 0; token < tokens; ++token) {
    const auto slot = static_cast<refreekv::index_t>(first + token);
    for (std::size_t head = 0; head < kv_heads(); ++head) {
      const std::size_t source = token * row + head * head_dim();
      const auto h = static_cast<refreekv::index_t>(head);
      std::copy_n(&keys[source], head_dim(), key_rows.run_at(0, h, slot).data);
      std::copy_n(&values[source], head_dim(), value_rows.run_at(0, h, slot).data);
    }
  }
}

std::vector<std::uint8_t> paged_layer::shared_pages() const {
  std::vector<std::uint8_t> bits((table_.size() + 7) / 8);
  for (std::size_t page = 0; page < table_.size(); ++page) {
    const bool shared = pool_->manager.owners(table_[page]) > 1;
    bits[page / 8] = static_cast<std::uint8_t>(bits[page / 8] | (shared ? 1 << page % 8 : 0));
  }
  return bits;
}

std::size_t paged_layer::shared_tokens() const {
  const auto shared = [&](block_id page) { return pool_->manager.owners(page) > 1; };
  const auto last = std::find_if(table_.rbegin(), table_.rend(), shared);
  return static_cast<std::size_t>(table_.rend() - last) * pool_->shape().tokens;
}

void paged_layer::assign(const paged_layer& other) {
  const std::size_t pages = pool_->shape().pages_for(static_cast<std::size_t>(other.slots_.tokens));
  for (std::size_t page = 0; page < pages; ++page) {
    pool_->copy(other.table_.at(page), table_.at(page));
  }
  slots_ = other.slots_;
}

std::vector<block_id> paged_layer::shrink(std::vector<block_id> table,
                                          const refreekv::kept_range& slots) {
  std::vector<block_id> freed;
  for (const block_id page : table_) {  // no page is in a table twice
    if (std::find(table.begin(), table.end(), page) != table.end()) continue;
    pool_->manager.release(page);
    if (pool_->manager.owners(page) == 0) freed.push_back(page);
  }
  table_ = std::move(table);
  slots_ = slots;
  return freed;
}

std::optional<paged_cache> paged_cache::admit(page_pool& pool, std::size_t layers,
                                              std::size_t tokens, const paged_cache* prefix) {
  const std::size_t page_tokens = pool.shape().tokens;
  const std::size_t begun = prefix == nullptr ? 0 : prefix->next_position();
  if (tokens < begun) throw std::logic_error("a sequence is as long as its prefix at least");
  if (begun % page_tokens != 0) throw std::logic_error("a prefix is whole pages");
  const std::size_t needed = pool.shape().pages_for(tokens) - begun / page_tokens;
  const auto blocks = pool.manager.allocate(layers * needed);
  if (!blocks) return std::nullopt;

  paged_cache cache;
  for (std::size_t index = 0; index < layers; ++index) {
    std::vector<block_id> table;
    if (prefix != nullptr) {
      table = prefix->layer(index).table();
      for (const block_id page : table) pool.manager.share(page);
    }
    const auto first = blocks->begin() + static_cast<std::ptrdiff_t>(index * needed);
    table.insert(table.end(), first, first + static_cast<std::ptrdiff_t>(needed));
    cache.layers_.emplace_back(pool, std::move(table), begun);
  }
  cache.advance(begun);
  return cache;
}

std::size_t paged_cache::pages() const {
  std::size_t pages = 0;
  for (const paged_layer& layer : layers_) pages += layer.table().size();
  return pages;
}

}  // namespace paged
