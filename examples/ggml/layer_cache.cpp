// SPDX-License-Identifier: Apache-2.0
#include "ggml/layer_cache.hpp"

#include <cstring>
#include <new>
#include <utility>

namespace ggml_engine {

namespace {

constexpr std::size_t spare_slots = 64;  // a move of the layer for every so many tokens

std::byte* bytes_of(const ggml_tensor* tensor) { return static_cast<std::byte*>(tensor->data); }

}  // namespace

layer_cache layer_cache::copy() const {
  layer_cache result(row_elements_);
  result.hidden_ = hidden_;
  if (keys_.tensor == nullptr) return result;
  result.keys_ = allocate(capacity_);
  result.values_ = allocate(capacity_);
  result.capacity_ = capacity_;
  result.length_ = length_;
  std::memcpy(bytes_of(result.keys()), bytes_of(keys()), length_ * row_bytes());
  std::memcpy(bytes_of(result.values()), bytes_of(values()), length_ * row_bytes());
  return result;
}

void layer_cache::reserve(std::size_t tokens) {
  if (length_ + tokens > capacity_) move({0, length_}, tokens + spare_slots);
}

void layer_cache::retain(smollm2::slot_range slots) { move(slots, spare_slots); }

layer_cache::storage layer_cache::allocate(std::size_t slots) const {
  storage result;
  result.memory = smollm2::map_zeroed(slots * row_bytes());
  const std::span<std::byte> memory = result.memory.bytes();
  result.buffer.reset(ggml_backend_cpu_buffer_from_ptr(memory.data(), memory.size()));
  result.context.reset(ggml_init({ggml_tensor_overhead(), nullptr, /*no_alloc=*/true}));
  if (result.buffer == nullptr || result.context == nullptr) throw std::bad_alloc();
  result.tensor =
      ggml_new_tensor_2d(result.context.get(), GGML_TYPE_F16, static_cast<int64_t>(row_elements_),
                         static_cast<int64_t>(slots));
  ggml_backend_tensor_alloc(result.buffer.get(), result.tensor, memory.data());
  return result;
}

void layer_cache::move(smollm2::slot_range slots, std::size_t room) {
  for (storage* each : {&keys_, &values_}) {
    storage fresh = allocate(slots.length + room);
    if (slots.length > 0) {
      std::memcpy(bytes_of(fresh.tensor), bytes_of(each->tensor) + slots.first * row_bytes(),
                  slots.length * row_bytes());
    }
    *each = std::move(fresh);
  }
  length_ = slots.length;
  capacity_ = slots.length + room;
}

}  // namespace ggml_engine
