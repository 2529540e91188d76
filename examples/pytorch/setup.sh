#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# setup.sh: leaves build/pytorch/transformers, a Python with torch and transformers, and in
# build/pytorch/op the operator for that torch. 2.5 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."

tests/install_packages.sh pkg-config libeigen3-dev libpcre2-dev libcli11-dev nlohmann-json3-dev
python=build/pytorch/transformers
if [ ! -e $python/ready ]; then
  python3 -c 'import ensurepip, venv' 2> /dev/null || tests/install_packages.sh python3-venv
  python3 -m venv $python
  # Of torch's own dependencies only those without which it does not load: the rest is for GPUs.
  $python/bin/pip install --quiet --no-deps torch==2.15.0 nvidia-nccl-cu13==2.30.7 \
    nvidia-cusparselt-cu13==0.8.1 nvidia-nvshmem-cu13==3.8.0 nvidia-cufile==1.20.0.107
  $python/bin/pip install --quiet --no-deps accelerate==1.15.0
  $python/bin/pip install --quiet transformers==5.23.0 gguf==0.19.0 filelock fsspec jinja2 \
    networkx psutil setuptools sympy
  touch $python/ready
fi
cmake -S . -B build/pytorch/op -DCMAKE_CXX_FLAGS=-march=native -DREFREEKV_TESTS=OFF \
  -DREFREEKV_BENCH=OFF -DREFREEKV_CUDA=OFF -DREFREEKV_PYTHON="$PWD/$python/bin/python3"
cmake --build build/pytorch/op --parallel "$(nproc)" --target refreekv_torch_python
tests/fetch_model.sh build/model
