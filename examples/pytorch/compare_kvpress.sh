#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# compare_kvpress.sh [OPTION...]: ReFreeKV beside kvpress's presses, in one run; installs what is
# missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

examples/pytorch/setup.sh
python=build/pytorch/kvpress
if [ ! -e $python/ready ]; then
  python3 -m venv $python
  # torch is that of the other one; what this one has itself comes first.
  realpath build/pytorch/transformers/lib/python3*/site-packages > \
    "$(echo $python/lib/python3*/site-packages)/torch.pth"
  $python/bin/pip install --quiet --no-deps kvpress==0.5.5 peft==0.21.2
  $python/bin/pip install --quiet transformers==5.2.0 tokenizers==0.22.1 'cachetools<6' datasets \
    'fire<0.7' gguf==0.19.0 'pandas<3' requests
  touch $python/ready
fi
OMP_WAIT_POLICY=passive $python/bin/python3 examples/pytorch/compare_kvpress.py \
  --library build/pytorch/op/examples/pytorch/librefreekv_torch_python.so \
  --model build/model/SmolLM2-135M-Instruct.Q4_1.gguf "$@" \
  examples/prompts/{definitions,licence}.txt  # eggs.txt is shorter than the window of SnapKVPress
