// SPDX-License-Identifier: Apache-2.0
// Buffers of the key/value cache: growing, appending, and keeping a part.
#include "kv_cache.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace smollm2 {
namespace {

// Small, because what is spare is as much memory as what pruning saves on a short prompt.
constexpr std::size_t growth_tokens = 64;

float* floats_of(const pages& buffer) { return reinterpret_cast<float*>(buffer.bytes().data()); }

}  // namespace

layer_cache::layer_cache(std::size_t kv_heads, std::size_t head_dim)
    : head_dim_(head_dim), blocks_(kv_heads) {}

layer_cache::layer_cache(const layer_cache& other)
    : layer_memory(other),
      head_dim_(other.head_dim_),
      blocks_(other.blocks_),
      keys_(map_zeroed(other.keys_.bytes().size())),
      values_(map_zeroed(other.values_.bytes().size())) {
  // Only rows in use: to touch the spare ones would make them resident.
  for (std::size_t head = 0; head < kv_heads(); ++head) {
    const std::size_t elements = length(head) * head_dim_;
    std::copy_n(other.keys(head), elements, keys(head));
    std::copy_n(other.values(head), elements, values(head));
  }
}

layer_cache& layer_cache::operator=(const layer_cache& other) { return *this = layer_cache(other); }

float* layer_cache::keys(std::size_t kv_head) {
  return floats_of(keys_) + blocks_[kv_head].first_row * head_dim_;
}

float* layer_cache::values(std::size_t kv_head) {
  return floats_of(values_) + blocks_[kv_head].first_row * head_dim_;
}

const float* layer_cache::keys(std::size_t kv_head) const {
  return floats_of(keys_) + blocks_[kv_head].first_row * head_dim_;
}

const float* layer_cache::values(std::size_t kv_head) const {
  return floats_of(values_) + blocks_[kv_head].first_row * head_dim_;
}

kv_rows layer_cache::rows_from(std::size_t kv_head, std::size_t row) const {
  return {keys(kv_head) + row * head_dim_, values(kv_head) + row * head_dim_,
          length(kv_head) - row};
}

std::optional<std::size_t> layer_cache::head_stride() const {
  const std::size_t capacity = blocks_.front().capacity;
  const auto same = [&](const block& each) { return each.capacity == capacity; };
  if (!std::all_of(blocks_.begin(), blocks_.end(), same)) return std::nullopt;
  return capacity * head_dim_;
}

void layer_cache::reserve(std::size_t tokens) {
  const auto fits = [&](const block& each) { return tokens <= each.capacity - each.length; };
  if (std::all_of(blocks_.begin(), blocks_.end(), fits)) return;
  // All heads at once, so that heads of equal length stay a dense tensor.
  std::vector<std::size_t> capacity;  // [kv_head]
  for (const block& each : blocks_) {
    capacity.push_back(each.length + std::max(tokens, growth_tokens));
  }
  resize(capacity);
}

void layer_cache::append(std::span<const float> keys, std::span<const float> values) {
  const std::size_t row = kv_heads() * head_dim_;
  const std::size_t tokens = keys.size() / row;
  if (keys.size() != tokens * row || values.size() != keys.size()) {
    throw std::invalid_argument("append: keys and values must be [token, kv_head, head_dim]");
  }

  reserve(tokens);
  for (std::size_t head = 0; head < kv_heads(); ++head) {
    float* key_rows = this->keys(head) + length(head) * head_dim_;
    float* value_rows = this->values(head) + length(head) * head_dim_;
    for (std::size_t token = 0; token < tokens; ++token) {
      const std::size_t source = token * row + head * head_dim_;
      std::copy_n(keys.data() + source, head_dim_, key_rows + token * head_dim_);
      std::copy_n(values.data() + source, head_dim_, value_rows + token * head_dim_);
    }
    blocks_[head].length += tokens;
  }
}

void layer_cache::retain(std::span<const std::size_t> first_slot,
                         std::span<const std::size_t> length) {
  if (first_slot.size() != kv_heads() || length.size() != kv_heads()) {
    throw std::invalid_argument("retain: one range of slots for each KV head is needed");
  }
  for (std::size_t head = 0; head < kv_heads(); ++head) {
    const std::size_t slots = blocks_[head].length;
    if (first_slot[head] > slots || length[head] > slots - first_slot[head]) {
      throw std::out_of_range("retain: the range reaches past the slots in use");
    }
  }
  for (std::size_t head = 0; head < kv_heads(); ++head) {
    blocks_[head].first_row += first_slot[head];
    blocks_[head].length = length[head];
  }
  resize(length);
}

void layer_cache::resize(std::span<const std::size_t> capacity) {
  const std::size_t rows = std::accumulate(capacity.begin(), capacity.end(), std::size_t{0});
  pages fresh_keys = map_zeroed(rows * head_dim_ * sizeof(float));
  pages fresh_values = map_zeroed(rows * head_dim_ * sizeof(float));
  std::size_t first_row = 0;
  for (std::size_t head = 0; head < kv_heads(); ++head) {
    const std::size_t elements = length(head) * head_dim_;
    std::copy_n(keys(head), elements, floats_of(fresh_keys) + first_row * head_dim_);
    std::copy_n(values(head), elements, floats_of(fresh_values) + first_row * head_dim_);
    blocks_[head].first_row = first_row;
    blocks_[head].capacity = capacity[head];
    first_row += capacity[head];
  }
  keys_ = std::move(fresh_keys);
  values_ = std::move(fresh_values);
}

std::size_t kv_cache::bytes() const {
  std::size_t bytes = 0;
  for (const layer_cache& layer : layers_) bytes += layer.bytes();
  return bytes;
}

}  // namespace smollm2
