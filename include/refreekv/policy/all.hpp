// SPDX-License-Identifier: Apache-2.0
// Every policy. A new policy needs a header, a test and a line here.
#pragma once

#include "refreekv/policy/attention_ranked.hpp"
#include "refreekv/policy/cake.hpp"
#include "refreekv/policy/faithful.hpp"
#include "refreekv/policy/h2o.hpp"
#include "refreekv/policy/pyramidkv.hpp"
#include "refreekv/policy/refreekv.hpp"
#include "refreekv/policy/snapkv.hpp"
#include "refreekv/policy/streaming_llm.hpp"
#include "refreekv/policy/tova.hpp"
#include "refreekv/policy/twilight.hpp"

namespace refreekv::inline v0 {

/// The policies that decide after a prefill, with their defaults. `cake_decode`, CAKE's decoding
/// step, is not one of them. Command lines, bindings and tests are made from this list.
using all_policies = std::tuple<policy::refreekv, policy::faithful, policy::streaming_llm,
                                policy::h2o, policy::snapkv, policy::pyramidkv, policy::cake,
                                policy::tova, policy::attention_ranked, policy::twilight>;

}  // namespace refreekv::inline v0
