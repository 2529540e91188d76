// SPDX-License-Identifier: Apache-2.0
// A sequence's cache in pages of a shared pool, with a page table and a length for each layer.
#pragma once

#include <cstdint>
#include <optional>
#include <refreekv/refreekv.hpp>
#include <vector>

#include "page_pool.hpp"
#include "sequence_memory.hpp"

namespace paged {

// Slots are counted along the page table. Of those in use attention sees the ones that `slots`
// keeps: after a pruning that left the sinks where they were, there is a hole behind them.
class paged_layer : public smollm2::layer_memory {
 public:
  // Owns the table's pages together with whoever else does. The first `tokens` slots are in use.
  paged_layer(page_pool& pool, std::vector<block_id> table, std::size_t tokens);
  paged_layer(paged_layer&& other) noexcept;
  ~paged_layer() override;

  std::size_t kv_heads() const override { return pool_->shape().kv_heads; }
  std::size_t head_dim() const override { return pool_->shape().head_dim; }
  std::size_t length(std::size_t) const override {
    return static_cast<std::size_t>(slots_.length());
  }
  smollm2::kv_rows rows_from(std::size_t kv_head, std::size_t row) const override;

  // Throws std::length_error where the table has no room: pages are taken at admission.
  void reserve(std::size_t tokens) override;
  // Throws std::logic_error where that would write a page that others own, too.
  void append(std::span<const float> keys, std::span<const float> values) override;

  page_pool& pool() const { return *pool_; }
  const std::vector<block_id>& table() const { return table_; }
  const refreekv::kept_range& slots() const { return slots_; }

  // Keys and values of all slots in use, as a batch of one sequence.
  auto rows() const {
    const auto pages = static_cast<refreekv::index_t>(table_.size());
    return pool_->rows(
        refreekv::page_table<block_id>::padded({table_.data(), {1, pages}}, {&slots_.tokens, {1}}));
  }

  // One bit for each page of the table, lowest first: 1 where others own it, too.
  std::vector<std::uint8_t> shared_pages() const;
  // Slots up to the end of the last of these.
  std::size_t shared_tokens() const;

  // Copies the slots in use of a layer of the same pool, into pages that must be its own.
  void assign(const paged_layer& other);

  // Gives up the pages that are not in `table`, which is a part of the one that was. Returns those
  // that nobody owns any more.
  std::vector<block_id> shrink(std::vector<block_id> table, const refreekv::kept_range& slots);

 private:
  page_pool* pool_;
  std::vector<block_id> table_;
  refreekv::kept_range slots_;
};

class paged_cache : public smollm2::sequence_memory {
 public:
  // A cache with room for `tokens` tokens in every layer, or nothing where the pool has not as many
  // free pages. It begins with the tokens of `prefix`, whose pages it then owns, too: whole ones,
  // and not pruned.
  static std::optional<paged_cache> admit(page_pool& pool, std::size_t layers, std::size_t tokens,
                                          const paged_cache* prefix = nullptr);

  std::size_t layers() const { return layers_.size(); }
  paged_layer& layer(std::size_t index) override { return layers_[index]; }
  const paged_layer& layer(std::size_t index) const { return layers_[index]; }

  std::size_t pages() const;  // of all layers

 private:
  std::vector<paged_layer> layers_;
};

}  // namespace paged
