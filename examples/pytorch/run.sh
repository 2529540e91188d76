#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run.sh [GENERATE_OPTION...]: SmolLM2 in transformers, its cache pruned; installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

examples/pytorch/setup.sh
OMP_WAIT_POLICY=passive build/pytorch/transformers/bin/python3 examples/pytorch/generate.py \
  --library build/pytorch/op/examples/pytorch/librefreekv_torch_python.so \
  --model build/model/SmolLM2-135M-Instruct.Q4_1.gguf \
  --prompt-file examples/prompts/licence.txt "$@"
