#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# command_line_test.sh LLAMA_CPP MODEL: a good run prunes and says what it saved, bad input gets one
# line and its exit code.
set -uo pipefail
model=$2
. "$(dirname "$0")/../command_line.sh"

run=(--model "$model" --prompt "Name three colours.")
refuses 1 "no such file" --model "$work/none.gguf" --prompt x
printf 'not a model' > "$work/text.gguf"
refuses 1 "cannot load it" --model "$work/text.gguf" --prompt x
yes "and so on" | head -c 100000 > "$work/long.txt"
refuses 1 "context is 8192" --model "$model" --prompt-file "$work/long.txt"
refuses 1 "quantized V cache requires flash_attn" "${run[@]}" --values q8_0 --flash-attention off
refuses 2 "no cut for each KV head" "${run[@]}" --scope kv_head
for policy in h2o snapkv pyramidkv tova attention_ranked twilight; do
  refuses 2 "share their cells" "${run[@]}" --policy $policy
done
refuses 2 "threshold must be in" "${run[@]}" --threshold 2
refuses 2 "keys" "${run[@]}" --keys f12

"$program" --model "$model" --prompt-file "$(dirname "$0")/../../examples/prompts/definitions.txt" \
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
"$program" "${run[@]}" --tokens 4 --window 16 --keys q8_0 --values q8_0 > "$work/out" ||
  failures=$((failures + 1))
grep -q "given back" "$work/out" || { cat "$work/out"; failures=$((failures + 1)); }

[ $failures = 0 ] && echo "the command line behaves"
