// SPDX-License-Identifier: Apache-2.0
// Counts are not negative.
// fails with: narrow
#include <refreekv/refreekv.hpp>

#ifdef REFREEKV_BAD
constexpr refreekv::policy::refreekv policy{.window = -1};
#else
constexpr refreekv::policy::refreekv policy{.window = 1};
#endif
