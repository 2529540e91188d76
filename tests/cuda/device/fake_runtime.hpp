// SPDX-License-Identifier: Apache-2.0
// The functions of the CUDA runtime that launch, ask or wait, in a program's own version: they note
// that they were called and do nothing.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

namespace fake_runtime {

struct calls {
  std::map<std::string, int> counts;  ///< of each function
  std::vector<unsigned> blocks;       ///< of each launch of ours
  cudaError_t last = cudaSuccess;     ///< what nobody has read yet

  int launches() const { return static_cast<int>(blocks.size()); }
};

inline calls made;

}  // namespace fake_runtime
