// SPDX-License-Identifier: Apache-2.0
// llama.cpp logs why a call failed and returns only that it did: this keeps its complaints.
#pragma once

#include <string>

namespace llama_cpp {

// Once, before any other call: llama.cpp writes nothing to stderr from then on.
void silence_log();

// Throws std::runtime_error: `what`, then what llama.cpp has complained about since the last time.
[[noreturn]] void fail(const std::string& failure);

}  // namespace llama_cpp
