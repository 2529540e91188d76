#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# speed.sh: tokens/s and cache bytes of each engine that is there, full against pruned, after prompts
# of about 4,000 and 7,500 tokens. Builds what examples/run.sh builds, and on ggml and llama.cpp
# after examples/llama_cpp/install_sdk.sh. Reports and JSON: build/speed.
set -euo pipefail
cd "$(dirname "$0")/.."

tests/install_packages.sh pkg-config libeigen3-dev libpcre2-dev libcli11-dev nlohmann-json3-dev
command -v ninja > /dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR-Ninja}"
cmake -S . -B build/examples -DREFREEKV_TESTS=OFF -DREFREEKV_BENCH=OFF > /dev/null
engines=(smollm2 paged)
for engine in ggml llama_cpp; do
  grep -qE "^(\.\.\. )?$engine\b" <(cmake --build build/examples --target help) && engines+=($engine) ||
    echo "$engine is left out: see examples/llama_cpp/install_sdk.sh"
done
cmake --build build/examples --parallel "$(nproc)" --target "${engines[@]}"
tests/fetch_model.sh build/model
mkdir -p build/speed

text=examples/prompts/licence.txt
for tokens in 4000 7500; do
  head -c $((tokens * 51 / 10)) <(cat $text $text $text $text 2> /dev/null) > build/speed/$tokens.txt
  run() { # ENGINE RULE OPTION...
    local program=build/examples/examples/$1/$1 report=build/speed/$1.$2.$tokens
    local json=(--json $report.json)
    [[ " ${engines[*]} " = *" $1 "* ]] || return 0
    [ $1 != paged ] || json=()
    echo "== $1, $2, $tokens tokens"
    OMP_WAIT_POLICY=passive $program --model build/model/SmolLM2-135M-Instruct.Q4_1.gguf \
      --prompt-file build/speed/$tokens.txt --tokens 24 --speed "${json[@]}" "${@:3}" > $report.txt
    sed -n '/^kept/,$p' $report.txt
  }
  rows_16=(--window 16 --average frobenius)
  run smollm2 default
  run smollm2 rows_16 "${rows_16[@]}"
  run smollm2 faithful --policy faithful
  run paged default
  run paged rows_16 "${rows_16[@]}"
  run paged faithful --policy faithful
  run ggml default
  run ggml rows_16 "${rows_16[@]}"
  run ggml faithful --policy faithful --scope layer # the KV heads of a layer share its length
  run llama_cpp default --threshold 0.05 --sinks 16
done
