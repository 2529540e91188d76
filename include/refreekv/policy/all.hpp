// SPDX-License-Identifier: Apache-2.0
// Every policy.
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
