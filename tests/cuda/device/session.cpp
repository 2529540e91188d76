// SPDX-License-Identifier: Apache-2.0
#define CATCH_CONFIG_RUNNER
#include "session.hpp"

#include <cuda_runtime.h>

#include <cstdio>

#include "catch.hpp"

bool has_device() {
  int devices = 0;
  const bool has = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  if (!has) std::puts("no CUDA device: nothing was tested");
  return has;
}

int run_tests(int argc, char** argv) {
  Catch::Session session;
  const int error = session.applyCommandLine(argc, argv);
  return (error == 0 ? session.run() : error) == 0 ? 0 : 1;
}
