// SPDX-License-Identifier: Apache-2.0
// Prompts that hide a five-digit key in filler and ask for it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "prompts.hpp"

namespace evaluate {

// `count` prompts of about 1,000 to 3,500 tokens in equal steps, as tokens_of(text) counts them;
// the question is the last paragraph. The same on every machine for the same seed.
std::vector<prompt_text> pass_key_prompts(
    std::size_t count, std::uint64_t seed,
    const std::function<std::size_t(const std::string& text)>& tokens_of);

}  // namespace evaluate
