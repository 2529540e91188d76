#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# command_line_test.sh GGML MODEL: a good run prunes and leaves its file, bad input gets one line and
# its exit code.
set -uo pipefail
model=$2
. "$(dirname "$0")/../command_line.sh"

run=(--model "$model" --prompt "Name three colours.")
refuses 1 "no such file" --model "$work/none.gguf" --prompt x
head -c 100000 "$model" > "$work/short.gguf"
refuses 1 "truncated" --model "$work/short.gguf" --prompt x
sed 's/blk.7.attn_k.weight/blk.7.attn_x.weight/' "$model" > "$work/other.gguf"
refuses 1 "no tensor 'blk.7.attn_k.weight'" --model "$work/other.gguf" --prompt x
yes "and so on" | head -c 100000 > "$work/long.txt"
refuses 1 "context is 8192" --model "$model" --prompt-file "$work/long.txt"
refuses 1 "to measure; the model.s context is 8192" "${run[@]}" --tokens 8128 --speed
refuses 2 "share its length" "${run[@]}" --scope kv_head
refuses 2 "share its length" "${run[@]}" --policy twilight
refuses 2 "threshold must be in" "${run[@]}" --threshold 2
refuses 2 "prompt" --model "$model"

for policy in "refreekv" "streaming_llm --budget 14" "h2o --budget 50%" "snapkv --budget 50%" \
              "pyramidkv --budget 50%" "tova --budget 50%" "none"; do
  # shellcheck disable=SC2086
  "$program" "${run[@]}" --tokens 8 --compare --json "$work/run.json" --policy $policy > "$work/out" ||
    failures=$((failures + 1))
  python3 - "$work/run.json" "$policy" << 'EOP' || failures=$((failures + 1))
import json, sys
run = json.load(open(sys.argv[1]))
assert len(run["layers"]) == 30 and len(run["tokens"]) <= 8
kept = run["kept_fraction"]
assert kept == 1 if sys.argv[2] == "none" else 0.2 < kept < 0.95, kept
assert (run["against_full"]["mean_kl_nats"] == 0) == (kept == 1)
EOP
done

"$program" "${run[@]}" --tokens 2 --speed --json "$work/run.json" > "$work/out" ||
  failures=$((failures + 1))
python3 - "$work/run.json" << 'EOP' || failures=$((failures + 1))
import json, sys
speed = json.load(open(sys.argv[1]))["speed"]
full, half, pruned = (speed[name]["cache_bytes"] for name in ("full", "half_of_the_prompt", "pruned"))
assert full > pruned and full > half and speed["bandwidth_bytes_per_second"] > 0
weights = speed["weight_bytes"]
assert abs(speed["gain_by_bytes"] - ((weights + full) / (weights + pruned) - 1)) < 1e-9
assert abs(speed["gain"] + 1 - speed["pruned"]["tokens_per_second"]
           / speed["full"]["tokens_per_second"]) < 1e-9
EOP
[ $failures = 0 ] && echo "the command line behaves"
