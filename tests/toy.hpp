// SPDX-License-Identifier: Apache-2.0
// The toy data of golden/policies.json, rebuilt from 32-bit integers.
#pragma once

#include <cstdint>

#include "policy_reference.hpp"

namespace toy {

constexpr std::uint32_t seed = 1442, twilight_seed = 1847;
constexpr index_t tokens = 12;

inline std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

/// The unnormalised attention of query `row` of a layer's head to `token`; an integer.
inline double weight(index_t layer, index_t head, index_t row, index_t token) {
  const auto at = static_cast<std::uint32_t>(layer * 16 + head);
  const auto i = static_cast<std::uint32_t>(row), j = static_cast<std::uint32_t>(token);
  const std::uint32_t noise = 1 + mix(seed * 1000003u + (at * 64 + i) * 64 + j) % 8;
  const bool heavy = mix(seed * 7919u + 0x51ED270Bu + at * 64 + j) % 4 == 0;
  return std::pow(noise, 1 + layer) + (heavy ? 24 : 0) + (token == 0 ? 30 : 0);
}

/// As `weight`, but for the example of CAKE's decoding.
inline double decode_weight(index_t head, index_t row, index_t token) {
  const auto at = static_cast<std::uint32_t>((head * 64 + row) * 64 + token);
  return 1 + mix(seed * 31337u + at) % 997;
}

/// Causal attention between all tokens.
inline reference::attention_rows attention(index_t q_heads, index_t layer = 0) {
  reference::attention_rows rows{q_heads, tokens, tokens, {}};
  for (index_t h = 0; h < q_heads; ++h) {
    for (index_t i = 0; i < tokens; ++i) {
      double sum = 0;
      for (index_t j = 0; j <= i; ++j) sum += weight(layer, h, i, j);
      for (index_t j = 0; j < tokens; ++j) {
        rows.values.push_back(j <= i ? weight(layer, h, i, j) / sum : 0);
      }
    }
  }
  return rows;
}

/// Attention of one query to the tokens in each head's slots. slots: positions, [head].
template <class Weight>
reference::attention_rows row_of_slots(const std::vector<std::vector<position_t>>& slots,
                                       const Weight& weight_of) {
  const auto heads = static_cast<index_t>(slots.size());
  reference::attention_rows rows{heads, 1, static_cast<index_t>(slots.front().size()), {}};
  for (index_t h = 0; h < heads; ++h) {
    double sum = 0;
    for (const position_t p : slots[static_cast<std::size_t>(h)]) sum += weight_of(h, p);
    for (const position_t p : slots[static_cast<std::size_t>(h)]) {
      rows.values.push_back(weight_of(h, p) / sum);
    }
  }
  return rows;
}

constexpr index_t head_dim = 4;

inline double twilight_query(index_t head, index_t dim) {
  const auto i = static_cast<std::uint32_t>(head * 16 + dim);
  return (mix(twilight_seed * 31u + 1000 + i) % 9 - 4.0) / 2;
}

inline double twilight_key(index_t head, index_t token, index_t dim) {
  const auto i = static_cast<std::uint32_t>((head * 64 + token) * 16 + dim);
  return (mix(twilight_seed * 97u + 50000 + i) % 25 - 12.0) / 4;
}

inline reference::scores query(index_t head) {
  reference::scores out;
  for (index_t d = 0; d < head_dim; ++d) out.push_back(twilight_query(head, d));
  return out;
}

inline std::vector<reference::scores> keys(index_t head) {
  std::vector<reference::scores> out(tokens);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t d = 0; d < head_dim; ++d) {
      out[static_cast<std::size_t>(t)].push_back(twilight_key(head, t, d));
    }
  }
  return out;
}

/// Two query heads, with one KV head each or one for both.
inline problem twilight(index_t kv_heads) {
  problem p(kv_heads, 2 / kv_heads, head_dim, 1, {static_cast<position_t>(tokens)});
  for (index_t d = 0; d < head_dim; ++d) {
    for (index_t h = 0; h < 2; ++h) p.query(0, 0, h, d) = static_cast<float>(twilight_query(h, d));
    for (index_t h = 0; h < kv_heads; ++h) {
      for (index_t t = 0; t < tokens; ++t) {
        p.keys.at(0, h, t, d) = static_cast<float>(twilight_key(h, t, d));
      }
    }
  }
  return p;
}

}  // namespace toy
