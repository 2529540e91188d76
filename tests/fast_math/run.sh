#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# run.sh RUN_WITH COMPILER ARGUMENT...: compiles decisions.cpp with the arguments, what it expects
# without them, and runs it with an emulator, or with env.
set -eu
here=$(dirname "$0") run_with=$1 compiler=$2
shift 2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$compiler" -std=c++20 -O1 -c "$here/expected.cpp" -o "$folder/expected.o"
"$compiler" -std=c++20 -O1 "$@" "$here/decisions.cpp" "$folder/expected.o" -pthread -o "$folder/decisions"
"$run_with" "$folder/decisions"
