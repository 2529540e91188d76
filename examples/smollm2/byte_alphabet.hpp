// SPDX-License-Identifier: Apache-2.0
// GPT-2's printable alphabet, in which vocabularies spell the 256 bytes.
#pragma once

#include <string>
#include <string_view>

namespace smollm2 {

// The bytes that a vocabulary entry stands for. Throws std::runtime_error on a foreign character.
std::string bytes_of(std::string_view spelling);

}  // namespace smollm2
