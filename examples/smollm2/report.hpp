// SPDX-License-Identifier: Apache-2.0
// What a run found out, as text for people and as JSON for programs.
#pragma once

#include <filesystem>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "decode_speed.hpp"
#include "divergence.hpp"
#include "layer_pruning.hpp"

namespace smollm2 {

struct report {
  std::size_t prompt_tokens;          // all of the conversation's up to the answer
  std::vector<layer_pruning> layers;  // [layer], or one entry about all that share a cut
  double prefill_seconds;             // without pruning
  std::vector<int> tokens;
  std::string text;
  double decode_seconds;
  std::optional<comparison> against_full;
  std::optional<speed_test> speed;
  std::size_t peak_resident_bytes;                // of the process
  std::size_t largest_cache_bytes;                // while decoding
  std::optional<std::size_t> cache_bytes_at_end;  // where it was pruned while decoding

  double kept_fraction() const;  // mean over layers and KV heads, of the slots that each had
  bool pruned_before() const;    // whether some layer no longer had all tokens
  double prune_seconds() const;
  std::size_t bytes_before() const;
  std::size_t bytes_after() const;
  double tokens_per_second() const;
};

void print(const report& run, std::ostream& out);

// Throws std::runtime_error where the file cannot be written.
void write_json(const report& run, const std::filesystem::path& path);

// The same of a conversation, prompt by prompt.
void write_json(const std::vector<report>& turns, const std::filesystem::path& path);

}  // namespace smollm2
