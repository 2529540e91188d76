// SPDX-License-Identifier: Apache-2.0
// Runs a model in llama.cpp, prunes the prompt's cells and goes on in a smaller context.
#include <array>
#include <iomanip>
#include <iostream>

#include "command_line.hpp"
#include "greedy.hpp"
#include "llama_cpp_options.hpp"
#include "pooled_cut.hpp"
#include "report.hpp"
#include "resident_memory.hpp"
#include "stopwatch.hpp"

namespace {

using namespace llama_cpp;

smollm2::decode_step steps_of(context& cache) {
  return [&cache](int token) { return cache.decode(std::span(&token, 1)); };
}

// What this engine saved, and what it cannot save.
struct savings {
  std::size_t layers = 0;
  std::size_t cells_before = 0, cells_after = 0;
  std::size_t moved_bytes = 0;
  std::size_t resident_before = 0, resident_after = 0;
};

void print(const savings& saved, std::ostream& out) {
  const auto mebibytes = [](std::size_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  out << std::fixed << std::setprecision(1) << "all " << saved.layers
      << " layers share their cells in llama.cpp, so one cut is for all, the first ones included;\n"
      << "removed cells stay allocated, without flash attention they cost time, and a context\n"
      << "does not shrink: so what stays moved (" << mebibytes(saved.moved_bytes)
      << " MiB) into a new one: " << saved.cells_before << " -> " << saved.cells_after
      << " cells (multiples\nof 256), resident set " << mebibytes(saved.resident_before) << " -> "
      << mebibytes(saved.resident_after) << " MiB\n";
}

using smollm2::speed_tokens;

// The prompt's cache in several contexts, to decode side by side.
class speed_contexts {
 public:
  speed_contexts(const program_options& opts, std::span<const llama_token> prompt,
                 std::span<const std::uint8_t> unpruned, const refreekv::kept_range& kept,
                 std::size_t cell_bytes, context& pruned)
      : pruned_(pruned),
        full_(pruned.in(), opts.context, prompt.size() + speed_tokens),
        removed_(pruned.in(), opts.context, prompt.size() + speed_tokens),
        half_(pruned.in(), opts.context, prompt.size() / 2 + speed_tokens),
        threads_(opts.threads),
        cell_bytes_(cell_bytes),
        dropped_(static_cast<std::size_t>(kept.dropped())) {
    full_.restore(unpruned);
    removed_.restore(unpruned);
    removed_.remove(kept.sinks, kept.cut);
    half_.prefill(prompt.first(prompt.size() / 2));
    pruned_.remove(kept.next_position(), -1);
  }

  smollm2::speed_test measure_pruned() { return measure(pruned_, dropped_); }
  // Of its bytes no use is made: whether removed cells are read depends on the kernel.
  smollm2::speed_test measure_removed() { return measure(removed_, 0); }

 private:
  smollm2::decoding_cache decoding(context& cache, std::size_t dropped) const {
    const std::size_t cell_bytes = cell_bytes_;
    // Any token does: what it costs does not depend on it.
    return {[&cache] { cache.decode(std::array<llama_token, 1>{0}); },
            [&cache, dropped, cell_bytes] {
              return (static_cast<std::size_t>(cache.next_position()) - dropped) * cell_bytes;
            }};
  }

  smollm2::speed_test measure(context& other, std::size_t dropped) {
    const llama_pos full_end = full_.next_position(), half_end = half_.next_position();
    const auto result =
        smollm2::measure_speed(decoding(full_, 0), decoding(half_, 0), decoding(other, dropped),
                               other.in().bytes(), threads_);
    full_.remove(full_end, -1);
    half_.remove(half_end, -1);
    return result;
  }

  context& pruned_;
  context full_, removed_, half_;
  int threads_;
  std::size_t cell_bytes_, dropped_;
};

void run(const program_options& opts) {
  const model network(opts.model);
  const std::vector<llama_token> prompt = network.encode_chat(opts.prompt);
  const auto end = static_cast<llama_pos>(prompt.size());
  // The answer goes again before the measurement, so that both have the same room.
  const std::size_t room = std::max(opts.tokens, opts.speed ? speed_tokens : 0);
  if (prompt.size() + room > network.longest_context()) {
    throw std::runtime_error("the prompt has " + std::to_string(prompt.size()) + " tokens, " +
                             std::to_string(room) + " come after it and the model's context is " +
                             std::to_string(network.longest_context()));
  }
  smollm2::report result{};
  result.prompt_tokens = prompt.size();
  attention_tap tap(smollm2::window_of(opts.policy), first_layer_of(opts.policy));
  context cache(network, opts.context, prompt.size() + room, &tap);

  const smollm2::stopwatch prefill;
  const std::vector<float> logits = cache.prefill(prompt);
  result.prefill_seconds = prefill.seconds();

  std::optional<smollm2::generation> full;
  if (opts.compare) {
    full = smollm2::generate(steps_of(cache), logits, opts.tokens, -1);
    cache.remove(end, -1);
  }
  std::vector<std::uint8_t> unpruned;
  if (opts.speed) unpruned = cache.save();

  savings saved{.layers = network.layers(), .cells_before = cache.cells()};
  const std::size_t cell_bytes = tap.cache_bytes() / cache.cells();
  const smollm2::stopwatch pruning;
  const refreekv::kept_range kept = pooled_cut(opts.policy, tap, opts.threads);
  const double library_seconds = pruning.seconds();
  cache.remove(kept.sinks, kept.cut);
  saved.moved_bytes = cache.saved_bytes();
  saved.resident_before = smollm2::resident_bytes();
  cache = shrink(std::move(cache), static_cast<std::size_t>(kept.length()) + room);
  result.layers.push_back({.kept = {kept},
                           .counts = {},
                           .stand_ins = {},
                           .tokens = prompt.size(),
                           .bytes_before = saved.cells_before * cell_bytes,
                           .bytes_after = cache.cells() * cell_bytes,
                           .seconds = pruning.seconds(),
                           .library_seconds = library_seconds});
  saved.cells_after = cache.cells();
  saved.resident_after = smollm2::resident_bytes();

  if (full) {
    result.against_full = smollm2::compare(*full, steps_of(cache));
    cache.remove(end, -1);
  }
  const auto answer = smollm2::generate(steps_of(cache), logits, opts.tokens, network.end_token());
  result.tokens = answer.tokens;
  result.text = network.decode(answer.tokens);
  result.decode_seconds = answer.seconds;
  result.peak_resident_bytes = smollm2::peak_resident_bytes();

  std::optional<smollm2::speed_test> removed;
  if (opts.speed) {
    speed_contexts contexts(opts, prompt, unpruned, kept, cell_bytes, cache);
    result.speed = contexts.measure_pruned();
    removed = contexts.measure_removed();
  }
  smollm2::print(result, std::cout);
  print(saved, std::cout);
  if (removed) {
    std::cout << "removed alone, in the old context: " << removed->pruned.tokens_per_second()
              << " tokens/s, full cache beside it: " << removed->full.tokens_per_second() << '\n';
  }
  if (!opts.json.empty()) smollm2::write_json(result, opts.json);
}

}  // namespace

int main(int argc, char** argv) {
  return smollm2::run_program("llama_cpp", [&] {
    if (const auto opts = parse_options(argc, argv)) run(*opts);
  });
}
