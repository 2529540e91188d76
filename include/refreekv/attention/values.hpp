// SPDX-License-Identifier: Apache-2.0
// The values of a layer, for policies that look at more than keys.
#pragma once

#include "refreekv/attention/observation.hpp"
#include "refreekv/cache/fit.hpp"

namespace refreekv::inline v0 {

/// An observation of keys and queries, and the values that belong to the keys. The two may differ
/// in type, layout and head_dim, and values may be a part of the keys (MLA).
template <observation Seen, kv_source Values>
struct valued_observation : Seen {
  using observed = Seen;

  Values values;

  [[nodiscard]] constexpr const char* invalid() const noexcept {
    if (const char* why = Seen::invalid()) return why;
    return detail::differ(values, this->keys);
  }
};

template <observation Seen, kv_source Values>
  requires requires(const Seen& seen) {
    seen.queries;
    requires kv_source<std::remove_cvref_t<decltype(seen.keys)>>;
  }
[[nodiscard]] constexpr auto with_values(const Seen& seen, const Values& values) noexcept {
  detail::check_source<Values>();
  return valued_observation<Seen, Values>{{seen}, values};
}

}  // namespace refreekv::inline v0
