// SPDX-License-Identifier: Apache-2.0
// Runs SmolLM2 on a prompt and prunes each layer's cache right after that layer's prefill.
#include <algorithm>
#include <iostream>

#include "command_line.hpp"
#include "decode_pruning.hpp"
#include "decoding.hpp"
#include "generation.hpp"
#include "loaded_model.hpp"
#include "options.hpp"
#include "plot.hpp"
#include "progress_bar.hpp"
#include "report.hpp"
#include "resident_memory.hpp"
#include "stopwatch.hpp"

namespace {

using namespace smollm2;

// A conversation on one cache, which is pruned after each of the user's messages.
class conversation {
 public:
  conversation(const llama& model, const options& opts)
      : model_(model),
        opts_(opts),
        policy_(for_layers(opts.policy, model.config().layers)),
        prune_(policy_, model.config().q_heads, opts.threads, opts.protect),
        cache_(model.new_cache()),
        full_(model.new_cache()) {}

  // Takes the tokens of a message and answers until `end_token`.
  report answer(const std::vector<int>& message, int end_token, bool last) {
    text_.insert(text_.end(), message.begin(), message.end());
    if (last && opts_.speed) {
      require_room_for_speed(text_.size(), opts_.tokens, model_.config().context);
    }
    report result{};
    result.prompt_tokens = text_.size();
    const std::vector<float> logits = prefill(result);
    if (opts_.compare) {
      const std::vector<float> expected = follow(logits);
      kv_cache full = full_, pruned = cache_;
      const generation reference = generate(model_, expected, full, opts_.tokens, -1);
      pruner prune = prune_;
      decode_pruning decoding = while_decoding(prune);
      result.against_full = compare(reference, logits, [&](std::span<const int> tokens) {
        return decoding.score(tokens, pruned);
      });
    }
    decode_pruning decoding = while_decoding(prune_);
    const generation answer =
        generate(model_, logits, cache_, opts_.tokens, end_token, [&](int token) {
          std::vector<float> next = decoding.decode(token, cache_);
          result.largest_cache_bytes = std::max(result.largest_cache_bytes, cache_.bytes());
          return next;
        });
    if (opts_.prune_every > 0) result.cache_bytes_at_end = cache_.bytes();
    text_.insert(text_.end(), answer.tokens.begin(), answer.tokens.end());
    result.tokens = answer.tokens;
    result.decode_seconds = answer.seconds;
    result.peak_resident_bytes = peak_resident_bytes();
    return result;
  }

  // Of the caches as they are now, which it leaves longer.
  speed_test speed() {
    follow({});
    kv_cache half = model_.new_cache();
    model_.prefill(std::span(text_).first((full_.next_position() + 1) / 2), half);
    return measure_speed(decoding(model_, full_), decoding(model_, half), decoding(model_, cache_),
                         model_.weight_bytes(), opts_.threads);
  }

  const loss_picture& loss() const { return loss_; }

 private:
  static pruning_policy for_layers(pruning_policy policy, std::size_t layers) {
    set_layers(policy, layers);
    return policy;
  }

  decode_pruning while_decoding(pruner& prune) const {
    return {model_, prune, opts_.prune_every, window_of(policy_)};
  }

  // What a cache does not have yet, the last token of an answer among it.
  std::span<const int> after(const kv_cache& cache) const {
    return std::span(text_).subspan(cache.next_position());
  }

  std::vector<float> prefill(report& result) {
    const bool first = cache_.next_position() == 0;
    prefill_hooks hooks;
    hooks.window = window_of(policy_);
    double hook_seconds = 0;
    hooks.on_layer = [&](std::size_t layer, std::span<const float> queries, kv_cache& filled) {
      const stopwatch watch;
      // The first message is the same in the full cache. Later ones have another past.
      if (first && follows()) full_.layer(layer) = filled.layer(layer);
      if (first && layer == opts_.plot_layer && !opts_.plot.empty()) {
        loss_ = {layer, std::get<refreekv::policy::refreekv>(policy_).threshold,
                 prune_.loss_curve(layer, queries, filled.layer(layer))};
      }
      result.layers.push_back(prune_.prune(layer, queries, filled));
      if (std::holds_alternative<refreekv::policy::cake>(policy_)) settle(result.layers, filled);
      hook_seconds += watch.seconds();
    };
    progress_bar progress;
    hooks.on_progress = [&](double fraction) { progress.show("prefill", fraction); };
    const stopwatch watch;
    std::vector<float> logits = model_.prefill(after(cache_), cache_, hooks);
    result.prefill_seconds = watch.seconds() - hook_seconds;
    if (first && follows()) full_.advance(text_.size());
    return logits;
  }

  // CAKE prunes earlier layers again whenever it decides about one.
  static void settle(std::vector<layer_pruning>& layers, const kv_cache& cache) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      layers[l].bytes_after = cache.layer(l).bytes();
      for (std::size_t h = 0; h < layers[l].counts.size(); ++h) {
        layers[l].counts[h].count = static_cast<refreekv::position_t>(cache.layer(l).length(h));
      }
    }
  }

  bool follows() const { return opts_.compare || opts_.speed; }

  // Brings the full cache to where the pruned one is; returns its logits there.
  std::vector<float> follow(const std::vector<float>& logits) {
    return after(full_).empty() ? logits : model_.prefill(after(full_), full_);
  }

  const llama& model_;
  const options& opts_;
  pruning_policy policy_;
  pruner prune_;
  std::vector<int> text_;
  kv_cache cache_;
  kv_cache full_;  // followed for --compare and --speed only
  loss_picture loss_{};
};

void run(options opts) {
  const loaded_model loaded = load_model(opts.model, opts.threads);
  const llama& model = loaded.network;
  const tokenizer& tokens = loaded.tokens;
  if (!opts.plot_layer) opts.plot_layer = model.config().layers / 2;
  if (*opts.plot_layer >= model.config().layers) {
    throw std::runtime_error("--plot-layer: the model has layers 0 to " +
                             std::to_string(model.config().layers - 1));
  }

  conversation talk(model, opts);
  std::vector<report> turns;
  const auto send = [&](const std::vector<int>& message, bool last) {
    report& turn = turns.emplace_back(talk.answer(message, tokens.end_token(), last));
    turn.text = tokens.decode(turn.tokens);
    if (last && opts.speed) turn.speed = talk.speed();
    print(turn, std::cout);
  };
  send(tokens.encode_chat(opts.prompt), opts.replies.empty());
  for (const std::string& reply : opts.replies) {
    std::cout << "\n> " << reply << "\n\n";
    send(tokens.encode_reply(reply), &reply == &opts.replies.back());
  }

  if (!opts.json.empty() && turns.size() == 1) write_json(turns.front(), opts.json);
  if (!opts.json.empty() && turns.size() > 1) write_json(turns, opts.json);
  if (!opts.plot.empty()) draw(turns.front(), talk.loss(), opts.plot);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("smollm2", [&] {
    if (auto opts = parse_options(argc, argv)) run(*std::move(opts));
  });
}
