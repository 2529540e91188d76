// SPDX-License-Identifier: Apache-2.0
// Everything but the CPU: the core, the policies and the CUDA backend.
#pragma once

#include "refreekv/attention/page_bounds.hpp"
#include "refreekv/attention/valued_layer.hpp"
#include "refreekv/cache/layered.hpp"
#include "refreekv/cache/layouts.hpp"
#include "refreekv/cache/scaled_keys.hpp"
#include "refreekv/cache/segmented.hpp"
#include "refreekv/core/version.hpp"
#include "refreekv/cuda/backend.cuh"
#include "refreekv/key_index.hpp"
#include "refreekv/local_ranges.hpp"
#include "refreekv/masks.hpp"
#include "refreekv/pages.hpp"
#include "refreekv/policy/all.hpp"
#include "refreekv/prune.hpp"
