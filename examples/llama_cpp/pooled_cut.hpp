// SPDX-License-Identifier: Apache-2.0
// One cut for all layers: in llama.cpp they share their cells.
#pragma once

#include "attention_tap.hpp"
#include "pruning_policy.hpp"

namespace llama_cpp {

// Null, or why the policy cannot decide on all layers together.
const char* why_unpoolable(const smollm2::pruning_policy& policy);

// The first layer that the policy decides about.
std::size_t first_layer_of(const smollm2::pruning_policy& policy);

// What stays of the prompt that `layer` shows: the query heads of all its layers are one group,
// whose norm curve is the sum of theirs, as the library sums those of several ranks. Keys in f16
// and f32 are read where they are; others, and those on a device, are copied as floats first.
// Throws std::runtime_error where refreekv refuses, or where the policy is unpoolable.
refreekv::kept_range pooled_cut(const smollm2::pruning_policy& policy, const attention_tap& tap,
                                int threads);

}  // namespace llama_cpp
