#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the SmolLM2 example in build/examples, installing what is missing, and runs it on the licence.
set -euo pipefail
cd "$(dirname "$0")/.."

tests/install_packages.sh pkg-config libeigen3-dev libpcre2-dev libcli11-dev \
  nlohmann-json3-dev gnuplot-nox
command -v ninja > /dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR-Ninja}"
cmake -S . -B build/examples -DREFREEKV_TESTS=OFF -DREFREEKV_BENCH=OFF
cmake --build build/examples --parallel "$(nproc)" --target smollm2
tests/fetch_model.sh build/model

# OpenMP's threads sleep while they wait: they would burn the cores of a busy machine.
OMP_WAIT_POLICY=passive build/examples/examples/smollm2/smollm2 \
  --model build/model/SmolLM2-135M-Instruct.Q4_1.gguf \
  --prompt-file LICENSE --question "What must a copy of the work carry?" --plot build/smollm2
echo "picture: build/smollm2.svg, build/smollm2.png"
