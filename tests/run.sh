#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# tests/run.sh [BUILD_DIR] [-- CTEST_ARGUMENT...]: builds and runs all tests, in build/tests unless
# told otherwise. Installs what is missing and ends with CTest's summary.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/tests
if [ $# -gt 0 ] && [ "$1" != -- ]; then build=$1; shift; fi
[ "${1-}" = -- ] && shift

"$root/tests/install_packages.sh" pkg-config libeigen3-dev catch2 libpcre2-dev \
  libcli11-dev nlohmann-json3-dev gnuplot-nox
"$root/tests/install_packages.sh" libopenmpi-dev openmpi-bin libtorch-dev ||
  echo "the tests of the examples that need them are skipped"
command -v ninja > /dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR-Ninja}"
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DREFREEKV_WERROR=ON \
  -DREFREEKV_BENCH=OFF
cmake --build "$build" --parallel "$(nproc)"
ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)" "$@"
