// SPDX-License-Identifier: Apache-2.0
// Reads golden/policies.json: the tokens of toy data that the methods' published code keeps.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "catch.hpp"
#include "toy.hpp"

namespace golden {

using nlohmann::json;
using reference::scores;
using kept_heads = std::vector<std::vector<position_t>>;  // [kv_head]

inline json entries() {
  const char* folder = std::getenv("REFREEKV_GOLDEN");
  const std::filesystem::path path = folder != nullptr ? folder : REFREEKV_GOLDEN_DIR;
  std::ifstream file(path / "policies.json");
  REQUIRE(file);
  return json::parse(file);
}

/// Sorts positions: published code has its own order of slots, ours is ascending.
inline std::vector<position_t> ascending(const json& positions) {
  auto out = positions.get<std::vector<position_t>>();
  std::sort(out.begin(), out.end());
  return out;
}

inline kept_heads ascending_heads(const json& heads) {
  kept_heads out;
  for (const json& head : heads) out.push_back(ascending(head));
  return out;
}

inline kept_heads positions(const std::vector<reference::choice>& heads) {
  kept_heads out;
  for (const auto& head : heads) out.push_back(head.positions());
  return out;
}

/// The positions of the tokens in `slots`, [kv_head].
inline kept_heads at_slots(const kept_heads& positions, const kept_heads& slots) {
  kept_heads out;
  for (std::size_t h = 0; h < slots.size(); ++h) {
    out.emplace_back();
    for (const position_t slot : slots[h])
      out.back().push_back(positions[h][static_cast<std::size_t>(slot)]);
  }
  return out;
}

/// Checks that values are equal up to the six digits of the file.
inline void check_close(const scores& ours, const json& theirs, double relative = 0) {
  REQUIRE(ours.size() == theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i) {
    INFO("entry " << i);
    CHECK(ours[i] == Approx(theirs[i].get<double>()).margin(2e-6).epsilon(relative));
  }
}

inline void check_close(const std::vector<scores>& ours, const json& theirs) {
  REQUIRE(ours.size() == theirs.size());
  for (std::size_t i = 0; i < ours.size(); ++i) check_close(ours[i], theirs[i]);
}

using check = std::function<void(const json&)>;
using checks = std::map<std::string, check>;
using reasons = std::map<std::string, std::string>;

/// Runs the check of each entry. Each entry must have either a check, or a reason for having none.
inline void check_entries(const json& entries, const checks& checked, const reasons& others) {
  for (const auto& [name, entry] : entries.items()) {
    INFO(name);
    const auto found = checked.find(name);
    CHECK((found != checked.end()) != (others.count(name) == 1));
    if (found != checked.end()) found->second(entry);
  }
  for (const auto& [name, unused] : checked) {
    INFO(name << " is checked");
    CHECK(entries.contains(name));
  }
  for (const auto& [name, why] : others) {
    INFO(name << ": " << why);
    CHECK(entries.contains(name));
  }
}

}  // namespace golden
