// SPDX-License-Identifier: Apache-2.0
// Runs select with a workspace of exactly workspace_size, between canaries.
#pragma once

#include "catch.hpp"
#include "problem.hpp"
#include "test_backend.hpp"

namespace refreekv {
inline std::ostream& operator<<(std::ostream& out, const kept_range& k) {
  return out << "{sinks " << k.sinks << ", cut " << k.cut << " of " << k.tokens << ", loss "
             << k.loss << ", mass " << k.dropped_mass << "}";
}
}  // namespace refreekv

struct selection {
  refreekv::status status;
  index_t groups = 0;
  std::vector<refreekv::kept_range> kept;  // [sequence, group]

  const refreekv::kept_range& at(index_t sequence, index_t group = 0) const {
    return kept[static_cast<std::size_t>(sequence * groups + group)];
  }
};

/// Runs select and checks the canaries. The workspace has `missing` bytes less than workspace_size.
template <class Policy, class Backend, class Layer, class Reduce = refreekv::single_rank>
selection run_select(const Policy& policy, const Backend& backend, const Layer& layer,
                     std::size_t missing = 0, const Reduce& reduce = {}) {
  constexpr std::size_t margin = 64;
  constexpr auto canary = std::byte{0xA5};
  const refreekv::kept_range untouched{-7, -7, -7, -7, -7};
  const std::size_t bytes = refreekv::workspace_size(policy, backend, layer) - missing;
  std::vector<std::byte> memory(bytes + 2 * margin + 1, canary);
  const index_t groups = policy.groups(layer);
  const auto cuts = static_cast<std::size_t>(layer.sequences() * groups);
  selection result{{}, groups, std::vector<refreekv::kept_range>(cuts + 2, untouched)};
  std::byte* start = memory.data() + margin + 1;  // odd: unaligned on purpose
  result.status = refreekv::select(
      policy, backend, layer,
      refreekv::view<refreekv::kept_range, 2>(result.kept.data() + 1, {layer.sequences(), groups}),
      refreekv::workspace<>(start, bytes), reduce);
  const auto is_canary = [](std::byte b) { return b == canary; };
  REQUIRE(std::all_of(memory.data(), start, is_canary));
  REQUIRE(std::all_of(start + bytes, memory.data() + memory.size(), is_canary));
  REQUIRE(result.kept.front() == untouched);
  REQUIRE(result.kept.back() == untouched);
  result.kept.erase(result.kept.begin());
  result.kept.pop_back();
  if (result.status != refreekv::status::ok) {
    for (const auto& kept : result.kept) REQUIRE(kept == untouched);
  }
  return result;
}
