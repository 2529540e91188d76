// SPDX-License-Identifier: Apache-2.0
// Runs a policy on what an engine shows of a layer, whatever its cache is made of.
#pragma once

#include <algorithm>
#include <concepts>
#include <stdexcept>
#include <string>
#include <vector>

#include "layer_pruning.hpp"
#include "pruning_policy.hpp"

namespace smollm2 {

inline void require_ok(refreekv::status status) {
  if (status != refreekv::status::ok) {
    throw std::runtime_error(std::string("pruning failed: ") + refreekv::to_string(status));
  }
}

struct slot_range {
  std::size_t first;
  std::size_t length;
};

// Owns the threads and the memory that decisions take; both are used again for every layer.
class policy_runner {
 public:
  explicit policy_runner(int threads) : pool_(threads) {}

  // Fills in what stays of the layer: result.kept or result.counts. Throws std::runtime_error where
  // refreekv refuses.
  template <class Policy, class Layer>
  void decide(const Policy& policy, const Layer& layer, layer_pruning& result) {
    const refreekv::cpu_backend backend{pool_};
    const refreekv::index_t groups = refreekv::groups_of(policy, layer);
    scratch_.resize(std::max(scratch_.size(), refreekv::workspace_size(policy, backend, layer)));
    if constexpr (range_policy<Policy>) {
      result.kept.resize(static_cast<std::size_t>(groups));
      require_ok(
          refreekv::select(policy, backend, layer, {result.kept.data(), {1, groups}}, scratch_));
    } else {
      result.counts.resize(static_cast<std::size_t>(groups));
      positions_.resize(
          std::max(positions_.size(), static_cast<std::size_t>(groups * layer.capacity())));
      if constexpr (valued_policy<Policy>) make_room(policy, layer, result);
      require_ok(refreekv::select(policy, backend, layer, positions_of(result), scratch_));
    }
  }

  // Any policy that needs to see no other layer. With keep_everything nothing is decided.
  template <class Layer, class Values>
  void decide(const pruning_policy& policy, const Layer& layer, const Values& values,
              layer_pruning& result) {
    std::visit(
        [&]<class Policy>(const Policy& each) {
          if constexpr (std::same_as<Policy, refreekv::policy::cake>) {
            throw std::runtime_error("cake shares its budget among layers: it needs all of them");
          } else if constexpr (valued_policy<Policy>) {
            decide(each, refreekv::with_values(layer, values), result);
          } else if constexpr (!std::same_as<Policy, keep_everything>) {
            decide(each, layer, result);
          }
        },
        policy);
  }

  // After decide: moves what stays together in every source of `rows`, keys and values of all KV
  // heads, and returns in which slots it now is, [group]. Stand-ins are behind it, and count.
  template <class... Rows>
  std::vector<slot_range> compact(layer_pruning& result, const Rows&... rows) {
    const refreekv::cpu_backend backend{pool_};
    if (!result.counts.empty()) {
      constexpr auto mode = refreekv::compaction::suffix_down;
      require_ok(refreekv::compact(backend, positions_of(result), mode, rows...));
      std::vector<slot_range> slots = slots_of(result.counts, mode);
      for (std::size_t h = 0; h < result.stand_ins.size(); ++h) {
        slots[h].length += static_cast<std::size_t>(result.stand_ins[h]);
      }
      return slots;
    }
    constexpr auto mode = refreekv::compaction::sinks_up;
    const auto groups = static_cast<refreekv::index_t>(result.kept.size());
    const refreekv::view<const refreekv::kept_range, 2> kept(result.kept.data(), {1, groups});
    require_ok(refreekv::compact(backend, kept, mode, rows...));
    return slots_of(result.kept, mode);
  }

 private:
  template <class Kept>
  static std::vector<slot_range> slots_of(const std::vector<Kept>& kept,
                                          refreekv::compaction mode) {
    std::vector<slot_range> slots;
    for (const Kept& each : kept) {
      slots.push_back({static_cast<std::size_t>(refreekv::first_slot(each, mode)),
                       static_cast<std::size_t>(each.length())});
    }
    return slots;
  }

  // Room for as many stand-ins as the policy may leave.
  template <class Layer>
  void make_room(const refreekv::policy::faithful& policy, const Layer& layer,
                 layer_pruning& result) {
    const refreekv::index_t heads = layer.kv_heads();
    const refreekv::index_t stand_ins = policy.most_stand_ins(layer.capacity());
    if (stand_ins == 0) return;
    result.stand_ins.resize(static_cast<std::size_t>(heads));
    const auto fit = [&](std::vector<float>& memory, refreekv::index_t dim) {
      memory.resize(std::max(memory.size(), static_cast<std::size_t>(heads * stand_ins * dim)));
      return refreekv::view(memory.data(), {1, heads, stand_ins, dim});
    };
    stand_ins_ = {fit(stand_in_keys_, layer.head_dim()),
                  fit(stand_in_values_, layer.values.shape().head_dim),
                  {}};
  }

  // The tokens that result.counts counts, and the stand-ins that result.stand_ins does.
  refreekv::kept_with_stand_ins<> positions_of(layer_pruning& result) {
    const auto heads = static_cast<refreekv::index_t>(result.counts.size());
    const auto room = static_cast<refreekv::index_t>(positions_.size() / result.counts.size());
    const refreekv::kept_positions<> kept{refreekv::view(positions_.data(), {1, heads, room}),
                                          refreekv::view(result.counts.data(), {1, heads})};
    if (result.stand_ins.empty()) return kept;
    return {
        kept,
        {stand_ins_.keys, stand_ins_.values, refreekv::view(result.stand_ins.data(), {1, heads})}};
  }

  refreekv::thread_pool pool_;
  std::vector<std::byte> scratch_;                      // grows with the largest layer, then stays
  std::vector<refreekv::position_t> positions_;         // [kv_head, room], the same
  std::vector<float> stand_in_keys_, stand_in_values_;  // the same
  refreekv::stand_in_rows<> stand_ins_;                 // of the layer that was decided on
};

}  // namespace smollm2
