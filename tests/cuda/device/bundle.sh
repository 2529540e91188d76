#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bundle.sh ARCH [BUILD_DIR]: builds the tests and the benchmark for devices of an architecture (90
# is an H100's), in build/device unless told otherwise, and leaves them in build/device_bundle: all
# that run_on_device.sh needs on a machine that has a driver, and neither compiler nor packages.
# Installs what is missing.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '3,6s/^# //p' "$0" >&2; exit 2; }
arch=$1
root=$(cd "$(dirname "$0")/../../.." && pwd)
build=${2-$root/build/device}
bundle=$root/build/device_bundle
programs=(refreekv_device_tests refreekv_pinned_tests refreekv_cuda_bench)

"$root/tests/install_packages.sh" pkg-config libeigen3-dev catch2 nlohmann-json3-dev \
  libbenchmark-dev xz-utils
command -v ninja > /dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR-Ninja}"
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DREFREEKV_WERROR=ON \
  -DREFREEKV_EXAMPLES=OFF -DREFREEKV_DEVICE_ARCH="$arch-real"
cmake --build "$build" --parallel "$(nproc)" --target "${programs[@]}" refreekv_device_probe

rm -rf "$bundle"
mkdir -p "$bundle/golden"
find "$build" -type f -name refreekv_device_probe -exec strip -o "$bundle/probe" {} +
for program in "${programs[@]}"; do
  find "$build" -type f -name "$program" -exec strip -o "$bundle/$program" {} +
  # A benchmark of the system's is not on the other machine.
  library=$(ldd "$bundle/$program" | awk '/libbenchmark/ { print $3 }')
  [ -z "$library" ] || cp -L "$library" "$bundle/"
done
xz --threads=0 "${programs[@]/#/$bundle/}"
cp "$root"/tests/golden/{*.csv,policies.json} "$bundle/golden"
cp "$root/tests/cuda/device/run_on_device.sh" "$bundle"
git -C "$root" describe --always --dirty > "$bundle/revision" 2> /dev/null || true
echo "$bundle: $((SECONDS / 60)) min $((SECONDS % 60)) s, $(du -sm "$bundle" | cut -f1) MB"
