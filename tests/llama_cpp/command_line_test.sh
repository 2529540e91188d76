#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# command_line_test.sh LLAMA_CPP MODEL: a good run prunes and says what it saved, bad input gets one
# line and its exit code.
set -uo pipefail
llama_cpp=$1 model=$2
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
failures=0

# refuses CODE TEXT ARGUMENT...: exit code, one line on stderr that has TEXT, nothing on stdout.
refuses() {
  local code=$1 text=$2 got
  shift 2
  "$llama_cpp" "$@" > "$work/out" 2> "$work/err"
  got=$?
  if [ $got != "$code" ] || [ "$(wc -l < "$work/err")" != 1 ] || ! grep -q -- "$text" "$work/err" ||
     [ -s "$work/out" ]; then
    echo "llama_cpp $*: exit code $got, expected $code and one line with '$text':"
    cat "$work/out" "$work/err"
    failures=$((failures + 1))
  fi
}

run=(--model "$model" --prompt "Name three colours.")
refuses 1 "no such file" --model "$work/none.gguf" --prompt x
printf 'not a model' > "$work/text.gguf"
refuses 1 "cannot load it" --model "$work/text.gguf" --prompt x
yes "and so on" | head -c 100000 > "$work/long.txt"
refuses 1 "context is 8192" --model "$model" --prompt-file "$work/long.txt"
refuses 1 "quantized V cache requires flash_attn" "${run[@]}" --values q8_0 --flash-attention off
refuses 2 "no cut for each KV head" "${run[@]}" --scope kv_head
for policy in h2o snapkv pyramidkv attention_ranked twilight; do
  refuses 2 "share their cells" "${run[@]}" --policy $policy
done
refuses 2 "threshold must be in" "${run[@]}" --threshold 2
refuses 2 "keys" "${run[@]}" --keys f12

"$llama_cpp" --model "$model" --prompt-file "$(dirname "$0")/../../examples/prompts/definitions.txt" \
  --policy streaming_llm --budget 200 --tokens 8 --compare --json "$work/run.json" > "$work/out" ||
  failures=$((failures + 1))
grep -q "768 -> 256 cells" "$work/out" || { cat "$work/out"; failures=$((failures + 1)); }
python3 - "$work/run.json" << 'END' || failures=$((failures + 1))
import json, sys
run = json.load(open(sys.argv[1]))
assert len(run["layers"]) == 1 and run["layers"][0]["kept"][0]["sinks"] == 4
assert run["cache_bytes_before"] == 768 * 23040 and run["cache_bytes_after"] == 256 * 23040
assert 0 < run["against_full"]["mean_kl_nats"] < 5 and 0 < len(run["tokens"]) <= 8
END
"$llama_cpp" "${run[@]}" --tokens 4 --window 16 --keys q8_0 --values q8_0 > "$work/out" ||
  failures=$((failures + 1))
grep -q "given back" "$work/out" || { cat "$work/out"; failures=$((failures + 1)); }

[ $failures = 0 ] && echo "the command line behaves"
