// SPDX-License-Identifier: Apache-2.0
// The cache hands back the rows that went in, whatever it was grown, cut and copied to in between.
#include "kv_cache.hpp"

#include <algorithm>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "catch.hpp"

using namespace smollm2;

namespace {

constexpr std::size_t kv_heads = 3;
constexpr std::size_t head_dim = 4;

// Every element tells where it comes from: token, kv_head and place in the row.
float element(std::size_t token, std::size_t kv_head, std::size_t d) {
  return static_cast<float>((token * kv_heads + kv_head) * head_dim + d);
}

// Appends tokens [first, first + count); values are the negated keys.
void append(layer_cache& layer, std::size_t first, std::size_t count) {
  std::vector<float> keys;  // [token, kv_head, head_dim]
  for (std::size_t token = first; token < first + count; ++token) {
    for (std::size_t head = 0; head < kv_heads; ++head) {
      for (std::size_t d = 0; d < head_dim; ++d) keys.push_back(element(token, head, d));
    }
  }
  std::vector<float> values = keys;
  for (float& value : values) value = -value;
  layer.append(keys, values);
}

using token_lists = std::vector<std::vector<std::size_t>>;  // [kv_head][slot]

void check_holds(const layer_cache& layer, const token_lists& expected) {
  std::size_t wrong = 0;
  for (std::size_t head = 0; head < kv_heads; ++head) {
    REQUIRE(layer.length(head) == expected[head].size());
    REQUIRE(layer.capacity(head) >= layer.length(head));
    for (std::size_t slot = 0; slot < expected[head].size(); ++slot) {
      for (std::size_t d = 0; d < head_dim; ++d) {
        const float key = element(expected[head][slot], head, d);
        wrong += layer.keys(head)[slot * head_dim + d] != key;
        wrong += layer.values(head)[slot * head_dim + d] != -key;
      }
    }
  }
  CHECK(wrong == 0);
}

std::size_t whole_pages(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

}  // namespace

TEST_CASE("appended rows come back per KV head, over many steps of growth") {
  layer_cache layer(kv_heads, head_dim);
  token_lists expected(kv_heads);
  for (std::size_t token = 0; token < 300;) {
    const std::size_t count = std::min<std::size_t>(1 + token % 7, 300 - token);
    append(layer, token, count);
    for (auto& tokens : expected) {
      for (std::size_t i = 0; i < count; ++i) tokens.push_back(token + i);
    }
    token += count;
    check_holds(layer, expected);
    REQUIRE(layer.head_stride() == layer.capacity(0) * head_dim);
    REQUIRE(layer.keys(2) == layer.keys(0) + 2 * *layer.head_stride());
  }
}

TEST_CASE("random appends, cuts and copies agree with a plain list of tokens") {
  std::mt19937 random(7);
  const auto below = [&](std::size_t end) { return random() % end; };
  layer_cache layer(kv_heads, head_dim);
  token_lists expected(kv_heads);
  std::size_t next = 0;
  for (int step = 0; step < 300; ++step) {
    if (below(3) > 0) {
      const std::size_t count = 1 + below(40);
      append(layer, next, count);
      for (auto& tokens : expected) {
        for (std::size_t i = 0; i < count; ++i) tokens.push_back(next + i);
      }
      next += count;
    } else {
      std::vector<std::size_t> first(kv_heads);
      std::vector<std::size_t> length(kv_heads);
      std::size_t rows = 0;
      for (std::size_t head = 0; head < kv_heads; ++head) {
        first[head] = below(expected[head].size() + 1);
        length[head] = below(expected[head].size() - first[head] + 1);
        const auto begin = expected[head].begin() + static_cast<std::ptrdiff_t>(first[head]);
        expected[head] = {begin, begin + static_cast<std::ptrdiff_t>(length[head])};
        rows += length[head];
      }
      layer.retain(first, length);
      CHECK(layer.bytes() == 2 * whole_pages(rows * head_dim * sizeof(float)));
    }
    check_holds(layer, expected);
    if (below(5) == 0) layer = layer_cache(layer);
  }
}

TEST_CASE("a reserved layer takes its tokens without moving") {
  layer_cache layer(kv_heads, head_dim);
  layer.reserve(500);
  CHECK(layer.capacity(1) == 500);
  const float* keys = layer.keys(0);
  append(layer, 0, 500);
  CHECK(layer.keys(0) == keys);
  CHECK(layer.bytes() == 2 * whole_pages(500 * kv_heads * head_dim * sizeof(float)));
}

TEST_CASE("heads of different lengths have no common stride, heads of one length do") {
  layer_cache layer(kv_heads, head_dim);
  append(layer, 0, 10);
  layer.retain(std::vector<std::size_t>{2, 2, 2}, std::vector<std::size_t>{5, 5, 5});
  CHECK(layer.head_stride() == 5 * head_dim);
  layer.retain(std::vector<std::size_t>{0, 1, 0}, std::vector<std::size_t>{5, 4, 3});
  CHECK_FALSE(layer.head_stride().has_value());
}

TEST_CASE("ranges outside the slots in use are refused and change nothing") {
  layer_cache layer(kv_heads, head_dim);
  append(layer, 0, 10);
  const std::vector<std::size_t> zeros(kv_heads, 0);
  CHECK_THROWS_AS(layer.retain(zeros, std::vector<std::size_t>{10, 11, 10}), std::out_of_range);
  CHECK_THROWS_AS(layer.retain(std::vector<std::size_t>{11, 0, 0}, zeros), std::out_of_range);
  CHECK_THROWS_AS(layer.retain(zeros, std::vector<std::size_t>{1}), std::invalid_argument);
  CHECK(layer.length(0) == 10);
  CHECK(layer.length(1) == 10);
}

TEST_CASE("a copy shares nothing with its original") {
  kv_cache cache(2, kv_heads, head_dim);
  append(cache.layer(1), 0, 10);
  cache.advance(10);
  kv_cache copy = cache;
  CHECK(copy.bytes() == cache.bytes());
  CHECK(copy.next_position() == 10);

  copy.layer(1).retain(std::vector<std::size_t>{5, 5, 5}, std::vector<std::size_t>{1, 1, 1});
  copy.layer(1).keys(0)[0] = -1;
  copy.advance(1);
  CHECK(cache.layer(1).length(0) == 10);
  CHECK(cache.layer(1).keys(0)[5 * head_dim] == element(5, 0, 0));
  CHECK(cache.next_position() == 10);
}
