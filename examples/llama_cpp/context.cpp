// SPDX-License-Identifier: Apache-2.0
#include "context.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "attention_tap.hpp"
#include "log.hpp"

namespace llama_cpp {

context::context(const model& in, const context_options& options, std::size_t cells,
                 attention_tap* tap)
    : model_(&in), options_(options), tap_(tap) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(cells);
  params.n_threads = params.n_threads_batch = options.threads;
  params.flash_attn_type =
      options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.type_k = options.keys;
  params.type_v = options.values;
  if (tap != nullptr) {
    params.cb_eval = &attention_tap::on_node;
    params.cb_eval_user_data = tap;
    // What is looked at is computed as one.
    params.n_ubatch = std::max(params.n_ubatch, static_cast<std::uint32_t>(tap->window()));
    params.n_batch = std::max(params.n_batch, params.n_ubatch);
  }
  context_.reset(llama_init_from_model(in.get(), params));
  if (context_ == nullptr) fail("llama.cpp makes no such context");
}

std::vector<float> context::prefill(std::span<const llama_token> prompt) {
  if (tap_ == nullptr) return decode(prompt);
  const std::size_t unseen = prompt.size() - std::min(prompt.size(), tap_->window());
  if (unseen > 0) decode(prompt.first(unseen));
  tap_->watch(prompt.size());
  std::vector<float> logits = decode(prompt.subspan(unseen));
  tap_->finish();
  return logits;
}

std::vector<float> context::decode(std::span<const llama_token> tokens) {
  while (!tokens.empty()) {
    const auto some = tokens.first(std::min<std::size_t>(tokens.size(), llama_n_batch(get())));
    std::vector<llama_token> batch(some.begin(), some.end());  // llama.cpp's is not const
    const int failed =
        llama_decode(get(), llama_batch_get_one(batch.data(), static_cast<int>(batch.size())));
    if (failed == 1) {
      fail("no room for token " + std::to_string(next_position()) + " in a context of " +
           std::to_string(cells()) + " cells");
    }
    if (failed != 0) fail("llama.cpp failed to compute token " + std::to_string(next_position()));
    tokens = tokens.subspan(some.size());
  }
  const float* logits = llama_get_logits_ith(get(), -1);
  return {logits, logits + model_->vocabulary_size()};
}

void context::remove(llama_pos first, llama_pos last) {
  if (!llama_memory_seq_rm(memory(), 0, first, last)) fail("llama.cpp cannot remove these tokens");
}

std::vector<std::uint8_t> context::save() const {
  std::vector<std::uint8_t> saved(saved_bytes());
  if (llama_state_seq_get_data(get(), saved.data(), saved.size(), 0) != saved.size()) {
    fail("llama.cpp did not save the sequence");
  }
  return saved;
}

void context::restore(std::span<const std::uint8_t> saved) {
  if (llama_state_seq_set_data(get(), saved.data(), saved.size(), 0) != saved.size()) {
    fail("llama.cpp did not restore the sequence in a context of " + std::to_string(cells()) +
         " cells");
  }
}

context shrink(context old, std::size_t cells) {
  const std::vector<std::uint8_t> saved = old.save();
  const model& in = old.in();
  const context_options options = old.options();
  { const context gone = std::move(old); }
  context smaller(in, options, cells);
  smaller.restore(saved);
  return smaller;
}

}  // namespace llama_cpp
