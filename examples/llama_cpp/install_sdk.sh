#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds llama.cpp and ggml once, outside the repository, where sdk.cmake finds them: from the
# Python package that carries their source (about 5 minutes on 2 cores).
set -euo pipefail
version=0.3.36
sdk=${REFREEKV_LLAMA_SDK:-${XDG_CACHE_HOME:-$HOME/.cache}/refreekv/llama-cpp-python-$version}

if [ -f "$sdk/lib/cmake/llama/llama-config.cmake" ]; then
  echo "llama.cpp is in $sdk"
  exit
fi
echo "building llama.cpp, of llama-cpp-python $version, into $sdk"
mkdir -p "$(dirname "$sdk")"
unfinished=$(mktemp -d "$sdk.XXXXXX")
trap 'rm -rf "$unfinished"' EXIT
# Neither the multimodal tools nor what the Python module needs at run time.
PIP_ROOT_USER_ACTION=ignore CMAKE_ARGS="-DLLAVA_BUILD=OFF ${CMAKE_ARGS-}" \
  python3 -m pip install --quiet --no-deps \
    --target "$unfinished" llama-cpp-python==$version
mv -T "$unfinished" "$sdk"
echo "llama.cpp is in $sdk"
