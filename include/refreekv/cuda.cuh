// SPDX-License-Identifier: Apache-2.0
// Everything but the CPU: the core, the policies and the CUDA backend.
#pragma once

#include "refreekv/cuda/backend.cuh"
#include "refreekv/decode_index.hpp"
#include "refreekv/layered.hpp"
#include "refreekv/layouts.hpp"
#include "refreekv/paged.hpp"
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
#include "refreekv/prune.hpp"
#include "refreekv/release.hpp"
#include "refreekv/scaled_keys.hpp"
#include "refreekv/shard.hpp"
#include "refreekv/version.hpp"
