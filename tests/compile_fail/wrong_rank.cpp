// SPDX-License-Identifier: Apache-2.0
// A cache has four axes.
// fails with: no matching (function|conversion) .*dense<float>
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
constexpr std::size_t rank = 3;
#else
constexpr std::size_t rank = 4;
#endif

auto cache(refreekv::view<float, rank> rows) { return refreekv::dense<float>(rows); }
