// SPDX-License-Identifier: Apache-2.0
#include "log.hpp"

#include <llama.h>

#include <stdexcept>
#include <utility>

namespace llama_cpp {

namespace {

std::string& complaints() {
  static std::string lines;
  return lines;
}

void keep_complaints(ggml_log_level level, const char* text, void*) {
  if (level != GGML_LOG_LEVEL_ERROR) return;
  std::string line = text;
  line.erase(line.find_last_not_of('\n') + 1);
  complaints() += (complaints().empty() ? "" : "; ") + line;
}

}  // namespace

void silence_log() { llama_log_set(keep_complaints, nullptr); }

void fail(const std::string& failure) {
  const std::string reason = std::exchange(complaints(), {});
  throw std::runtime_error(reason.empty() ? failure : failure + " (" + reason + ')');
}

}  // namespace llama_cpp
