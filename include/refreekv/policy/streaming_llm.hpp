// SPDX-License-Identifier: Apache-2.0
// StreamingLLM (arXiv 2309.17453): a fixed budget of sinks and recent tokens, no attention needed.
//
// While the budget holds all tokens there are and `incoming` more, all stay. Otherwise the sinks
// and the most recent ones stay, `incoming` fewer than the budget. The same rule serves after a
// prefill, after every decoded token (incoming 0; a share would be one of what the last step left)
// and before a turn that is known to bring `incoming` tokens. Keys keep their rotation here; the
// paper rotates them by slot. A cache that is pruned again and again keeps its own count of
// positions.
#pragma once

#include "refreekv/policy/budget.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

struct streaming_llm {
  template <class Memory>
  using decision = kept_ranges<Memory>;

  count_t sinks = 4;          ///< they stay whatever the budget is
  token_budget budget = 516;  ///< tokens, sinks included
  count_t incoming = 0;       ///< tokens about to come that must fit

  static constexpr const char* name = "streaming_llm";
  static constexpr std::tuple options{
      option{"sinks", &streaming_llm::sinks, "first tokens that always stay"},
      option{"budget", &streaming_llm::budget, "tokens that stay, sinks included"},
      option{"incoming", &streaming_llm::incoming, "tokens about to come that must fit"}};

  [[nodiscard]] constexpr index_t groups(const model_layer auto&) const noexcept { return 1; }

  struct buffers {};
  [[nodiscard]] buffers carve(arena&, const backend auto&, const model_layer auto&) const noexcept {
    return {};
  }

  template <backend Backend, model_layer Layer>
  status select(const Backend& exec, const Layer& layer, buffers,
                const decision<typename Layer::memory>& kept,
                const head_reduction auto&) const noexcept {
    return detail::assign(exec, layer, kept, *this);
  }

  /// What stays of a sequence. O(1)
  [[nodiscard]] REFREEKV_HOST_DEVICE kept_range operator()(index_t tokens) const noexcept {
    const index_t most = budget.of(tokens);
    const position_ranking ranking(tokens, sinks);
    return tokens + incoming <= most ? ranking.all() : ranking.best(most - incoming);
  }
};

}  // namespace refreekv::inline v0::policy
