// SPDX-License-Identifier: Apache-2.0
// An error is not overlooked.
// fails with: ignoring return
#include <refreekv/refreekv.hpp>

void shorten(const refreekv::dense<float>& values,
             refreekv::view<const refreekv::kept_range, 2> kept) {
#ifndef REFREEKV_BAD
  const refreekv::status status =
#endif
      refreekv::compact(refreekv::cpu_backend{}, kept, refreekv::compaction::sinks_up, values);
#ifndef REFREEKV_BAD
  if (status != refreekv::status::ok) return;
#endif
}
