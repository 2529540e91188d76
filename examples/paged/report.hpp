// SPDX-License-Identifier: Apache-2.0
// What came of a run, for people.
#pragma once

#include <ostream>

#include "serving.hpp"
#include "tokenizer.hpp"

namespace paged {

void print(const serving_result& run, const smollm2::tokenizer& tokens, std::ostream& out);

}  // namespace paged
