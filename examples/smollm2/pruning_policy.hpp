// SPDX-License-Identifier: Apache-2.0
// The policy of a run: one of the library's policies, or none.
#pragma once

#include <concepts>
#include <cstddef>
#include <refreekv/refreekv.hpp>
#include <tuple>
#include <variant>

namespace smollm2 {

struct keep_everything {};

template <class Policies>
struct policy_variant;
template <class... Policies>
struct policy_variant<std::tuple<Policies...>> {
  using type = std::variant<Policies..., keep_everything>;
};
using pruning_policy = policy_variant<refreekv::all_policies>::type;

// A policy whose decision is a prefix and a suffix of each layer.
template <class Policy>
concept range_policy = requires { typename Policy::template decision<refreekv::host_memory>; } &&
                       std::same_as<refreekv::decision_of<Policy, refreekv::host_memory>,
                                    refreekv::kept_ranges<refreekv::host_memory>>;

// A policy that looks at values, too, and may leave stand-ins for what goes.
template <class Policy>
concept valued_policy = std::same_as<Policy, refreekv::policy::faithful>;

// Null, or what is wrong with the policy's options.
const char* why_invalid(const pruning_policy& policy);

// Whether the policy is a range_policy, or keeps everything.
bool keeps_ranges(const pruning_policy& policy);

// How many of the last queries the policy looks at; where it is more than there are, all.
std::size_t window_of(const pruning_policy& policy);

// Tells a policy that spreads a budget over the layers how many there are.
void set_layers(pruning_policy& policy, std::size_t layers);

}  // namespace smollm2
