// SPDX-License-Identifier: Apache-2.0
// `ops` for any backend that can run thread blocks: CUDA, or the emulation in the tests.
#pragma once

#include "refreekv/backend/backend.hpp"
#include "refreekv/cuda/attention_spread.hpp"
#include "refreekv/cuda/compact.hpp"
#include "refreekv/cuda/crossing.hpp"
#include "refreekv/cuda/faithful/grades.hpp"
#include "refreekv/cuda/faithful/importance.hpp"
#include "refreekv/cuda/faithful/size_errors.hpp"
#include "refreekv/cuda/faithful/write_stand_ins.hpp"
#include "refreekv/cuda/head_quotas.hpp"
#include "refreekv/cuda/key_index.hpp"
#include "refreekv/cuda/pages.hpp"
#include "refreekv/cuda/ranked_scan.hpp"
#include "refreekv/cuda/select_pages.hpp"

namespace refreekv::inline v0::cuda_detail {

/// The primitives of ops<Backend>, started by run_blocks. Elements are float, f16_bits, bf16_bits
/// and types that stored_as maps to one of these. Keys may also be scaled_keys of int8 or
/// fp8_e4m3_bits, block_keys and int4_keys.
template <class Backend, class Memory>
struct device_ops {
  using memory = Memory;
  using scan_scratch = cuda_detail::scan_scratch;
  using attention_scratch = cuda_detail::attention_scratch;
  using selection_scratch = cuda_detail::selection_scratch;
  using sharing_scratch = cuda_detail::sharing_scratch<Memory>;
  using ranking_scratch = cuda_detail::ranking_scratch;
  using importance_scratch = cuda_detail::importance_scratch;

  template <class Layer>
  static scan_scratch carve_scan_scratch(arena& from, const Backend&, const norm_scan& scan,
                                         const Layer& layer) noexcept {
    return scan_scratch::carve(from, scan, layer);
  }
  template <class Layer>
  static attention_scratch carve_attention_scratch(arena& from, const Backend&, index_t rows,
                                                   const Layer& layer) noexcept {
    return attention_scratch::carve(from, rows, layer);
  }
  template <class Layer>
  static selection_scratch carve_selection_scratch(arena& from, const Backend&,
                                                   const Layer& layer) noexcept {
    return selection_scratch::carve(from, layer);
  }
  template <class Layer>
  static sharing_scratch carve_sharing_scratch(arena& from, const Backend&,
                                               const Layer& layer) noexcept {
    return cuda_detail::carve_sharing_scratch(from, layer);
  }
  template <class Layer>
  static ranking_scratch carve_ranking_scratch(arena& from, const Backend& exec,
                                               const Layer& layer) noexcept {
    return ranking_scratch::carve(from, exec, layer);
  }
  template <class Layer>
  static importance_scratch carve_importance_scratch(arena& from, const Backend&,
                                                     const importance_rule& rule,
                                                     const Layer& layer) noexcept {
    return importance_scratch::carve(from, rule, layer);
  }

  template <class F>
  static status for_each_sequence(const Backend& exec, index_t sequences, const F& f) noexcept {
    return run_blocks(exec, blocks_for(sequences), for_each_body<F>{sequences, f});
  }

  // Each forwards to the function of its name in cuda_detail. Contracts: backend/backend.hpp.
  static status read_chunks(const auto&... arguments) noexcept {
    return cuda_detail::read_chunks(arguments...);
  }
  static status normalise_rows(const auto&... arguments) noexcept {
    return cuda_detail::normalise_rows(arguments...);
  }
  static status norm_curve(const auto&... arguments) noexcept {
    return cuda_detail::norm_curve(arguments...);
  }
  static status crossing_curve(const auto&... arguments) noexcept {
    return cuda_detail::crossing_curve(arguments...);
  }
  static status find_cuts(const auto&... arguments) noexcept {
    return cuda_detail::find_cuts(arguments...);
  }
  static status compact(const auto&... arguments) noexcept {
    return cuda_detail::compact(arguments...);
  }
  static status attention_sums(const auto&... arguments) noexcept {
    return cuda_detail::attention_sums(arguments...);
  }
  static status attention_spread(const auto&... arguments) noexcept {
    return cuda_detail::attention_spread(arguments...);
  }
  static status pool(const auto&... arguments) noexcept { return cuda_detail::pool(arguments...); }
  static status keep_all(const auto&... arguments) noexcept {
    return cuda_detail::keep_all(arguments...);
  }
  static status share_quotas(const auto&... arguments) noexcept {
    return cuda_detail::share_quotas(arguments...);
  }
  static status top_tokens(const auto&... arguments) noexcept {
    return cuda_detail::top_tokens(arguments...);
  }
  static status top_mass(const auto&... arguments) noexcept {
    return cuda_detail::top_mass(arguments...);
  }
  static status rank_tokens(const auto&... arguments) noexcept {
    return cuda_detail::rank_tokens(arguments...);
  }
  static status stop_ranked(const auto&... arguments) noexcept {
    return cuda_detail::stop_ranked(arguments...);
  }
  static status select_pages(const auto&... arguments) noexcept {
    return cuda_detail::select_pages(arguments...);
  }
  static status weigh_tokens(const auto&... arguments) noexcept {
    return cuda_detail::weigh_tokens(arguments...);
  }
  static status grade_tokens(const auto&... arguments) noexcept {
    return cuda_detail::grade_tokens(arguments...);
  }
  static status find_sizes(const auto&... arguments) noexcept {
    return cuda_detail::find_sizes(arguments...);
  }
  static status fit_stand_ins(const auto&... arguments) noexcept {
    return cuda_detail::fit_stand_ins(arguments...);
  }
  static status keep_grades(const auto&... arguments) noexcept {
    return cuda_detail::keep_grades(arguments...);
  }
  static status write_stand_ins(const auto&... arguments) noexcept {
    return cuda_detail::write_stand_ins(arguments...);
  }
  static status quantise(const auto&... arguments) noexcept {
    return cuda_detail::quantise(arguments...);
  }
  static status bound_pages(const auto&... arguments) noexcept {
    return cuda_detail::bound_pages(arguments...);
  }
  static status write_masks(const auto&... arguments) noexcept {
    return cuda_detail::write_masks(arguments...);
  }
  static status plan_pages(const auto&... arguments) noexcept {
    return cuda_detail::plan_pages(arguments...);
  }
  static status release_pages(const auto&... arguments) noexcept {
    return cuda_detail::release_pages(arguments...);
  }
};

}  // namespace refreekv::inline v0::cuda_detail
