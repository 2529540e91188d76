#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# compare_torch.sh [OPTION...]: SnapKV's decision beside torch's own, in one run; installs what is
# missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

examples/pytorch/setup.sh
OMP_WAIT_POLICY=passive build/pytorch/transformers/bin/python3 examples/pytorch/compare_torch.py \
  --library build/pytorch/op/examples/pytorch/librefreekv_torch_python.so "$@"
