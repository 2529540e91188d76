// SPDX-License-Identifier: Apache-2.0
// A tiny Llama model with random weights, and its forward pass as the formulas read, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "catch.hpp"
#include "gguf_writer.hpp"

namespace smollm2_test {

struct small_llama {
  static constexpr std::size_t layers = 2, embedding = 24, feed_forward = 20, vocabulary = 11,
                               q_heads = 4, kv_heads = 2, head_dim = 6, rope_dims = 4,
                               context = 400;
  static constexpr double rope_base = 100, norm_epsilon = 0.125;

  struct tensor {
    std::vector<std::uint64_t> shape;  // C order
    std::vector<float> values;
  };
  std::map<std::string, tensor> tensors;

  explicit small_llama(bool tied_output = true) {
    add("token_embd.weight", {vocabulary, embedding});
    if (!tied_output) add("output.weight", {vocabulary, embedding});
    add("output_norm.weight", {embedding});
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      add(block + "attn_norm.weight", {embedding});
      add(block + "attn_q.weight", {q_heads * head_dim, embedding});
      add(block + "attn_k.weight", {kv_heads * head_dim, embedding});
      add(block + "attn_v.weight", {kv_heads * head_dim, embedding});
      add(block + "attn_output.weight", {embedding, q_heads * head_dim});
      add(block + "ffn_norm.weight", {embedding});
      add(block + "ffn_gate.weight", {feed_forward, embedding});
      add(block + "ffn_up.weight", {feed_forward, embedding});
      add(block + "ffn_down.weight", {embedding, feed_forward});
    }
  }

  gguf_writer metadata(const std::string& architecture = "llama") const {
    gguf_writer file;
    file.add("general.architecture", architecture);
    file.add("llama.block_count", std::uint32_t{layers});
    file.add("llama.context_length", std::uint32_t{context});
    file.add("llama.embedding_length", std::uint32_t{embedding});
    file.add("llama.feed_forward_length", std::uint32_t{feed_forward});
    file.add("llama.attention.head_count", std::uint32_t{q_heads});
    file.add("llama.attention.head_count_kv", std::uint32_t{kv_heads});
    file.add("llama.rope.freq_base", static_cast<float>(rope_base));
    file.add("llama.rope.dimension_count", std::uint32_t{rope_dims});
    file.add("llama.attention.layer_norm_rms_epsilon", static_cast<float>(norm_epsilon));
    return file;
  }

  gguf_writer file(const std::string& architecture = "llama") const {
    gguf_writer file = metadata(architecture);
    for (const auto& [name, each] : tensors) file.add_tensor(name, each.shape, each.values);
    return file;
  }

  // Whether a layer's query at one position may see the key at another; causality comes on top.
  using visibility = std::function<bool(std::size_t layer, std::size_t kv_head, std::size_t query,
                                        std::size_t key)>;

  struct result {
    std::vector<double> logits;                // [vocabulary], of the last token
    std::vector<std::vector<double>> queries;  // [layer][token, q_head, head_dim], rotated

    // [layer][q_head, token, token]: what each gives to each; 0 where it does not see it.
    std::vector<std::vector<double>> attention;
  };

  result run(std::span<const int> tokens, const visibility& visible) const {
    result out;
    rows hidden;  // [token][embedding]
    for (const int token : tokens) {
      const auto& table = tensors.at("token_embd.weight").values;
      const auto begin = table.begin() + token * static_cast<std::ptrdiff_t>(embedding);
      hidden.emplace_back(begin, begin + embedding);
    }
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const std::string block = "blk." + std::to_string(layer) + ".";
      rows q, k, v;
      for (std::size_t t = 0; t < tokens.size(); ++t) {
        const row x = norm(block + "attn_norm.weight", hidden[t]);
        q.push_back(rotate(times(block + "attn_q.weight", x), t));
        k.push_back(rotate(times(block + "attn_k.weight", x), t));
        v.push_back(times(block + "attn_v.weight", x));
      }
      auto& queries = out.queries.emplace_back();
      for (const row& each : q) queries.insert(queries.end(), each.begin(), each.end());
      auto& attention = out.attention.emplace_back(q_heads * tokens.size() * tokens.size());
      for (std::size_t t = 0; t < tokens.size(); ++t) {
        row attended(q_heads * head_dim);
        for (std::size_t h = 0; h < q_heads; ++h) {
          const std::size_t g = h / (q_heads / kv_heads);
          double* const weights = attention.data() + (h * tokens.size() + t) * tokens.size();
          double total = 0;
          for (std::size_t s = 0; s <= t; ++s) {
            if (!visible(layer, g, t, s)) continue;
            double dot = 0;
            for (std::size_t d = 0; d < head_dim; ++d) {
              dot += q[t][h * head_dim + d] * k[s][g * head_dim + d];
            }
            const double weight = std::exp(dot / std::sqrt(double{head_dim}));
            total += weight;
            weights[s] = weight;
            for (std::size_t d = 0; d < head_dim; ++d) {
              attended[h * head_dim + d] += weight * v[s][g * head_dim + d];
            }
          }
          for (std::size_t d = 0; d < head_dim; ++d) attended[h * head_dim + d] /= total;
          for (std::size_t s = 0; s <= t; ++s) weights[s] /= total;
        }
        add_to(hidden[t], times(block + "attn_output.weight", attended));
        const row x = norm(block + "ffn_norm.weight", hidden[t]);
        row gate = times(block + "ffn_gate.weight", x);
        const row up = times(block + "ffn_up.weight", x);
        for (std::size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
        add_to(hidden[t], times(block + "ffn_down.weight", gate));
      }
    }
    const bool tied = !tensors.contains("output.weight");
    out.logits = times(tied ? "token_embd.weight" : "output.weight",
                       norm("output_norm.weight", hidden.back()));
    return out;
  }

 private:
  using row = std::vector<double>;
  using rows = std::vector<row>;

  void add(const std::string& name, const std::vector<std::uint64_t>& shape) {
    std::size_t size = 1;
    for (const std::uint64_t extent : shape) size *= extent;
    std::normal_distribution<float> normal(shape.size() == 1 ? 1.0f : 0.0f, 0.5f);
    std::vector<float> values(size);
    for (float& value : values) value = normal(random_);
    tensors[name] = {shape, values};
  }

  row times(const std::string& name, const row& x) const {
    const tensor& weight = tensors.at(name);
    row y(weight.shape[0]);
    for (std::size_t i = 0; i < weight.values.size(); ++i) {
      y[i / x.size()] += weight.values[i] * x[i % x.size()];
    }
    return y;
  }

  row norm(const std::string& name, row x) const {
    double squares = 0;
    for (const double value : x) squares += value * value;
    const double rms = std::sqrt(squares / static_cast<double>(x.size()) + norm_epsilon);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= tensors.at(name).values[i] / rms;
    return x;
  }

  static row rotate(row x, std::size_t position) {
    for (std::size_t head = 0; head < x.size(); head += head_dim) {
      for (std::size_t d = 0; d < rope_dims; d += 2) {
        const double angle = static_cast<double>(position) *
                             std::pow(rope_base, -static_cast<double>(d) / double{rope_dims});
        const double even = x[head + d];
        const double odd = x[head + d + 1];
        x[head + d] = even * std::cos(angle) - odd * std::sin(angle);
        x[head + d + 1] = even * std::sin(angle) + odd * std::cos(angle);
      }
    }
    return x;
  }

  static void add_to(row& x, const row& y) {
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }

  std::mt19937 random_{3};
};

inline std::vector<int> random_tokens(std::size_t count, unsigned seed = 5) {
  std::mt19937 random(seed);
  std::vector<int> tokens(count);
  for (int& token : tokens) token = static_cast<int>(random() % small_llama::vocabulary);
  return tokens;
}

inline bool sees_all(std::size_t, std::size_t, std::size_t, std::size_t) { return true; }

// NaN where any of them is, and where there are more of one than of the other.
template <class A, class B>
double largest_difference(const A& a, const B& b) {
  double largest = a.size() == b.size() ? 0 : std::nan("");
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (!(difference <= largest)) largest = difference;
    if (std::isnan(largest)) break;
  }
  return largest;
}

template <class A, class B>
void check_close(const A& actual, const B& expected, double tolerance = 1e-4) {
  REQUIRE(actual.size() == expected.size());
  CHECK(largest_difference(actual, expected) < tolerance);
}

}  // namespace smollm2_test
