#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# command_line_test.sh SMOLLM2 MODEL: a good run leaves its files, bad input gets one line and its
# exit code.
set -uo pipefail
model=$2
. "$(dirname "$0")/../command_line.sh"

run=(--model "$model" --prompt "Name three colours.")
refuses 1 "no such file" --model "$work/none.gguf" --prompt x
printf 'not a model' > "$work/text.gguf"
refuses 1 "not a GGUF file" --model "$work/text.gguf" --prompt x
sed 's/general.architecture\(.\{12\}\)llama/general.architecture\1lxama/' "$model" > "$work/other.gguf"
refuses 1 "'lxama' model" --model "$work/other.gguf" --prompt x
head -c 100000 "$model" > "$work/short.gguf"
refuses 1 "truncated" --model "$work/short.gguf" --prompt x
refuses 1 "cannot read" --model "$model" --prompt-file "$work/none.txt"
yes "and so on" | head -c 100000 > "$work/long.txt"
refuses 1 "context is 8192" --model "$model" --prompt-file "$work/long.txt"
refuses 1 "to measure; the model.s context is 8192" "${run[@]}" --tokens 8128 --speed
refuses 1 "layers 0 to 29" "${run[@]}" --plot "$work/p" --plot-layer 30
refuses 2 "threshold must be in" "${run[@]}" --threshold 2
refuses 2 "threshold must be in" "${run[@]}" --threshold nan
refuses 2 "window must be >= 1" "${run[@]}" --window 0
refuses 2 "window" "${run[@]}" --window -1
refuses 2 "policy" "${run[@]}" --policy nonsense
refuses 2 "average" "${run[@]}" --average median
refuses 2 "tokens" "${run[@]}" --tokens 0
refuses 2 "prompt" --model "$model"
refuses 2 "prompt" "${run[@]}" --prompt-file LICENSE
refuses 2 "--protect wants BEGIN:END" "${run[@]}" --protect 7
refuses 2 "--protect wants BEGIN:END" "${run[@]}" --protect 7:3
refuses 2 "head_floor must be in" "${run[@]}" --policy snapkv --head-floor 1.1
refuses 2 "threshold is no option of snapkv" "${run[@]}" --policy snapkv --threshold 0.1
refuses 2 "budget is no option of faithful" "${run[@]}" --policy faithful --budget 3
refuses 2 "is not 0 or 1" "${run[@]}" --policy faithful --stand-ins 7
refuses 2 "incoming" "${run[@]}" --policy streaming_llm --incoming -1
refuses 2 "no --then" "${run[@]}" --policy cake --then "And?"
refuses 2 "keeps a range" "${run[@]}" --policy snapkv --protect 0:4
refuses 2 "--plot needs" "${run[@]}" --policy none --plot "$work/p"

"$program" "${run[@]}" --tokens 8 --compare --json "$work/run.json" --plot "$work/it's" \
  > "$work/out" || failures=$((failures + 1))
for file in run.json "it's.svg" "it's.png"; do
  [ -s "$work/$file" ] || { echo "$file was not written"; failures=$((failures + 1)); }
done
python3 - "$work/run.json" << 'EOF' || failures=$((failures + 1))
import json, sys
run = json.load(open(sys.argv[1]))
assert len(run["layers"]) == 30
assert run["cache_bytes_after"] == sum(layer["bytes_after"] for layer in run["layers"])
assert run["cache_bytes_after"] < run["cache_bytes_before"]
assert run["layers"][0]["kept_fraction"] == 1 and 0 < run["kept_fraction"] < 1
assert run["against_full"]["mean_kl_nats"] >= 0 and len(run["tokens"]) <= 8
EOF
"$program" "${run[@]}" --tokens 8 --compare --json "$work/talk.json" --full-layers 0 \
  --threshold 0.2 --protect 0:20 --then "Name a fourth one." --then "Thanks." > "$work/out" ||
  failures=$((failures + 1))
python3 - "$work/talk.json" << 'EOF' || failures=$((failures + 1))
import json, sys
turns = json.load(open(sys.argv[1]))["turns"]
assert len(turns) == 3
for earlier, later in zip(turns, turns[1:]):
    grown = later["prompt_tokens"] - earlier["prompt_tokens"]
    assert grown > 8
    for before, after in zip(earlier["layers"], later["layers"]):
        left, now = before["kept"][0], after["kept"][0]
        assert now["tokens"] == left["sinks"] + left["tokens"] - left["cut"] + grown
        assert now["sinks"] >= 20 or now["cut"] <= 4
assert turns[2]["layers"][9]["kept"][0]["tokens"] < turns[2]["prompt_tokens"]
EOF
"$program" "${run[@]}" --tokens 4 --policy cake --budget 50% --gamma 100 > "$work/out" ||
  failures=$((failures + 1))
"$program" "${run[@]}" --tokens 4 --policy streaming_llm --budget 14 > "$work/out" ||
  failures=$((failures + 1))
grep -q "given back" "$work/out" || { cat "$work/out"; failures=$((failures + 1)); }

[ $failures = 0 ] && echo "the command line behaves"
