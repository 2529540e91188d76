// SPDX-License-Identifier: Apache-2.0
// The engine with a tiny random model, and prompts for it.
#pragma once

#include "gguf_writer.hpp"
#include "llama.hpp"
#include "small_llama.hpp"

struct tiny_model {
  smollm2_test::small_llama formulas;
  smollm2::llama network = [this] {
    const smollm2_test::temporary_file file(formulas.file().bytes());
    return smollm2::llama(smollm2::gguf_file(file.path()), 1);
  }();
};

using smollm2_test::largest_difference;
using smollm2_test::random_tokens;
