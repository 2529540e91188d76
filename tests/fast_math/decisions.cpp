// SPDX-License-Identifier: Apache-2.0
// Decisions of layers that compilers' liberties with floating point would change. Products are
// whole multiples of 1/64, so that logits are exact however large they are.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>

#include "expected.hpp"
#include "refreekv/cpu/backend.hpp"
#include "refreekv/policy/refreekv.hpp"
#include "refreekv/policy/snapkv.hpp"
#include "refreekv/select.hpp"

namespace r = refreekv;

namespace {

std::mt19937 random_bits(20251124);
int wrong = 0, total = 0;

void check(bool right, const char* what) {
  ++total;
  if (right) return;
  ++wrong;
  std::printf("wrong: %s\n", what);
}

std::size_t size(long n) { return static_cast<std::size_t>(n); }

/// A multiple of 1/8, at most 2.
float step() { return static_cast<float>(static_cast<int>(random_bits() % 33) - 16) / 8; }

/// Keys grow with the tokens, and share a component that adds q * k to all logits.
layer random_layer(long tokens, long rows, float q, float k) {
  layer of{tokens, rows, 4, 2, 8, 0, {}, {}};
  of.queries.resize(size(rows * of.q_heads * of.head_dim));
  of.keys.resize(size(of.kv_heads * tokens * of.head_dim));
  for (float& x : of.queries) x = step();
  for (float& x : of.keys) x = step();
  for (std::size_t i = 0; i < of.queries.size(); i += 8) {
    of.queries[i] = q;
    of.queries[i + 1] = 2;
  }
  for (std::size_t i = 0; i < of.keys.size(); i += 8) {
    const auto token = static_cast<long>(i / 8) % tokens;
    of.keys[i] = k;
    of.keys[i + 1] = static_cast<float>(token * 32 / tokens) / 8;
  }
  return of;
}

float as(float x, float) { return x; }
r::f16_bits as(float x, r::f16_bits out) {
  const Eigen::half rounded(x);
  std::memcpy(&out, &rounded, sizeof out);
  return out;
}

template <class Key, class Decide>
void with_seen(const layer& of, const Decide& decide) {
  std::vector<Key> keys;
  for (const float x : of.keys) keys.push_back(as(x, Key{}));
  r::layer_info<> info{.index = 7};
  info.attention.scale = 1;
  info.attention.soft_cap = static_cast<float>(of.soft_cap);
  decide(r::observe(
      r::view<const float, 4>(of.queries.data(), {1, of.rows, of.q_heads, of.head_dim}),
      r::dense(r::view<const Key, 4>(keys.data(), {1, of.kv_heads, of.tokens, of.head_dim})),
      info));
}

template <class Key>
void check_cuts(const layer& of, const char* what, bool keeps_all = false) {
  with_seen<Key>(of, [&](const auto& layer) {
    for (const bool frobenius : {false, true}) {
      r::policy::refreekv policy{.threshold = 0.02, .window = static_cast<r::count_t>(of.rows)};
      if (frobenius) policy.average = r::row_average::frobenius;
      std::vector<std::byte> scratch(r::workspace_size(policy, r::cpu_backend{}, layer));
      r::kept_range kept;
      const bool ok =
          r::select(policy, r::cpu_backend{}, layer, {&kept, {1, 1}}, scratch) == r::status::ok;
      const bool right =
          keeps_all ? kept.dropped() == 0 && kept.tokens == of.tokens
                    : right_cut(of, frobenius, policy.threshold, kept.cut, double{kept.loss});
      check(ok && right, what);
    }
  });
}

void check_tokens(const layer& of, const char* what, bool keeps_all = false) {
  with_seen<float>(of, [&](const auto& layer) {
    const long budget = of.tokens / 3 + of.rows;
    const r::policy::snapkv policy{.budget = budget, .window = static_cast<r::count_t>(of.rows)};
    std::vector<std::byte> scratch(r::workspace_size(policy, r::cpu_backend{}, layer));
    std::vector<r::position_t> positions(size(of.kv_heads * of.tokens));
    std::vector<r::kept_tokens> counts(size(of.kv_heads));
    const r::kept_positions<> kept{{positions.data(), {1, of.kv_heads, of.tokens}},
                                   {counts.data(), {1, of.kv_heads}}};
    const bool ok = r::select(policy, r::cpu_backend{}, layer, kept, scratch) == r::status::ok;
    for (long h = 0; h < of.kv_heads; ++h) {
      const r::position_t* first = positions.data() + h * of.tokens;
      const long count = counts[size(h)].count;
      check(ok && (keeps_all ? count == of.tokens
                             : right_tokens(of, h, budget, {first, first + count})),
            what);
    }
  });
}

void check_exponential(float exponent) {
  namespace cpu = r::cpu_detail;
  for (float below = 0; below < 40; below += 0.01f) {
    const volatile float x = exponent * 0.6931472f - below;  // a float with x87, too
    float y[cpu::lane_count];
    cpu::store(cpu::exponential(cpu::splat(x), cpu::splat(exponent + cpu::integer_shift)), y);
    check(right_exponential(x, exponent, y[0]), "exponential");
  }
}

}  // namespace

int main() {
  for (const float exponent : {0.0f, 1000.0f, 9000.0f}) check_exponential(exponent);
  volatile double norm = std::numeric_limits<double>::infinity();
  check(!r::norm_scan::decidable(norm), "infinite norm");
  norm = std::numeric_limits<double>::quiet_NaN();
  check(!r::norm_scan::decidable(norm), "norm that is NaN");
  for (int i = 0; i < 8; ++i) {
    const long tokens = 40 + static_cast<long>(random_bits() % 600);
    for (const long rows : {1L, 3L}) {
      layer of = random_layer(tokens, rows, 0, 0);
      check_cuts<float>(of, "cut");
      check_cuts<r::f16_bits>(of, "cut, f16");
      check_tokens(of, "snapkv");
      of.soft_cap = 8;
      check_cuts<float>(of, "cut, soft cap");
      of = random_layer(tokens, rows, 64, 60);
      check_cuts<float>(of, "cut, logits of 3840");
      check_cuts<r::f16_bits>(of, "cut, logits of 3840, f16");
      check_tokens(of, "snapkv, logits of 3840");
      of = random_layer(tokens, rows, -64, 60);
      check_cuts<float>(of, "cut, logits of -3840");
      of = random_layer(tokens, rows, 64, 0);
      for (long h = 0; h < of.kv_heads; ++h) {
        // All but 1e-150 of the attention is the sinks', and the first candidates have the least.
        for (long t = 0; t < 8; ++t) {
          float* key = &of.keys[size((h * tokens + t) * of.head_dim)];
          std::fill_n(key, of.head_dim, 0.0f);
          key[0] = t < 4 ? 5.5f : -0.25f;
        }
      }
      check_cuts<float>(of, "cut behind the sinks' attention");
    }
  }
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const long token : {5L, 30L, 99L}) {
      for (const long rows : {1L, 3L}) {
        layer of = random_layer(100, rows, 1, 0);
        of.keys[size((token - (token == 99 ? rows : 0)) * of.head_dim)] = bad;
        check_cuts<float>(of, "cut without a norm", true);
        check_cuts<r::f16_bits>(of, "cut without a norm, f16", true);
        check_tokens(of, "snapkv without scores", true);
      }
    }
  }
  std::printf("%d of %d wrong\n", wrong, total);
  return wrong != 0;
}
