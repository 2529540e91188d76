// SPDX-License-Identifier: Apache-2.0
// StreamingLLM (arXiv 2309.17453): a fixed budget of sinks and recent tokens, no attention needed.
//
// All tokens stay if the budget holds them and `incoming` more. Otherwise the sinks and the most
// recent tokens stay, `incoming` fewer than the budget. Call it after a prefill, after every
// decoded token (with incoming 0), or before a turn that is known to bring `incoming` tokens. After
// decoded tokens, set the budget as a number: a share would be of the tokens that the last step
// kept. Keys keep their rotation here; the paper rotates them by slot. If a cache is pruned
// repeatedly, its owner counts positions separately.
#pragma once

#include "refreekv/policy/budget.hpp"
#include "refreekv/policy/policy.hpp"

namespace refreekv::inline v0::policy {

struct streaming_llm {
  template <class Memory>
  using decision = kept_ranges<Memory>;

  count_t sinks = 4;          ///< first tokens, which stay whatever the budget is
  token_budget budget = 516;  ///< tokens, sinks included
  count_t incoming = 0;       ///< tokens that will be added next and must fit

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

  /// Returns the kept range of a sequence of `tokens` tokens. O(1).
  [[nodiscard]] REFREEKV_HOST_DEVICE kept_range operator()(index_t tokens) const noexcept {
    const index_t most = budget.of(tokens);
    const position_ranking ranking(tokens, sinks);
    return tokens + incoming <= most ? ranking.all() : ranking.best(most - incoming);
  }
};

}  // namespace refreekv::inline v0::policy
