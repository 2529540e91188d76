// SPDX-License-Identifier: Apache-2.0
// What came of a run, for people.
#pragma once

#include <ostream>

#include "decoding_speed.hpp"
#include "serving.hpp"
#include "tokenizer.hpp"

namespace paged {

void print(const serving_result& run, const smollm2::tokenizer& tokens, std::ostream& out);
void print(const decoding_speed& run, std::ostream& out);

}  // namespace paged
