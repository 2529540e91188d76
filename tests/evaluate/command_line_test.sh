#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# command_line_test.sh EVALUATE MODEL: every method has its rows, their files agree, and bad
# input gets one line and its exit code.
set -uo pipefail
model=$2
. "$(dirname "$0")/../command_line.sh"

mkdir "$work/prompts" "$work/empty"
echo "Name three colours." > "$work/prompts/colours.txt"
echo "How many legs do two dogs and three birds have?" > "$work/prompts/legs.txt"
run=(--model "$model" --prompts "$work/prompts")
refuses 1 "no such file" --model "$work/none.gguf" --prompts "$work/prompts"
refuses 1 "cannot read" --model "$model" --prompts "$work/none.txt"
refuses 1 "no \*.txt files" --model "$model" --prompts "$work/empty"
refuses 1 "context is 8192" "${run[@]}" --tokens 8192
refuses 2 "prompts" --model "$model"
refuses 2 "methods" "${run[@]}" --methods nonsense
refuses 2 "budgets" "${run[@]}" --budgets 2
refuses 2 "budgets: 'snapkv' is no share" "${run[@]}" --budgets snapkv
refuses 2 "tokens" "${run[@]}" --tokens 0
refuses 2 "limit" "${run[@]}" --limit 0
refuses 2 "cake shares" "${run[@]}" --full-layers 2

"$program" "${run[@]}" --tokens 4 --budgets 0.5 --csv "$work/rows.csv" --json "$work/rows.json" \
  --plot "$work/it's" > "$work/out" || failures=$((failures + 1))
for file in rows.csv rows.json "it's.svg" "it's.png"; do
  [ -s "$work/$file" ] || { echo "$file was not written"; failures=$((failures + 1)); }
done
python3 - "$work/rows.json" "$work/rows.csv" << 'EOF' || failures=$((failures + 1))
import csv, json, sys
run = json.load(open(sys.argv[1]))
rows = list(csv.DictReader(open(sys.argv[2])))
assert [prompt["name"] for prompt in run["prompts"]] == ["colours", "legs"]
assert len(rows) == len(run["rows"]) * 3, "the mean and two prompts"
for row in run["rows"]:
    assert len(row["of_prompts"]) == 2
    for m in row["of_prompts"] + [row["mean"]]:
        assert 0 < m["kept_fraction"] <= 1 and m["mean_kl_nats"] > -1e-6, row
        assert m["largest_kl_nats"] >= m["mean_kl_nats"] - 1e-9 and 0 <= m["same_top_token"] <= 1
full = next(row for row in run["rows"] if row["method"] == "none")
assert full["mean"]["kept_fraction"] == 1 and full["mean"]["largest_kl_nats"] < 1e-6
EOF

"$program" "${run[@]}" --max-tokens 38 --methods streaming_llm --budgets 25% > "$work/out" \
  2> "$work/err" || failures=$((failures + 1))
grep -q "skips legs" "$work/err" && grep -q "^streaming_llm *25 %" "$work/out" ||
  { cat "$work/out" "$work/err"; failures=$((failures + 1)); }

# Questions after the pruning, a key, and sizes of a row that is not asked for.
printf 'Ann has two dogs.\n\nBob has three birds.\n\nWhat has Ann?' > "$work/prompts/ann.txt"
"$program" "${run[@]}" --tokens 4 --methods none tova --question-later --pass-keys 1 --seed 2 \
  --budgets "refreekv, threshold 10 %" 0.5 --json "$work/later.json" > "$work/out" 2> "$work/err" ||
  failures=$((failures + 1))
grep -q "skips colours, which has one paragraph" "$work/err" && grep -q " farther  keys " "$work/out" ||
  { cat "$work/out" "$work/err"; failures=$((failures + 1)); }
python3 - "$work/later.json" << 'EOF' || failures=$((failures + 1))
import json, sys
run = json.load(open(sys.argv[1]))
assert [prompt["name"] for prompt in run["prompts"]] == ["ann", "pass_key_01"], run["prompts"]
assert [prompt["has_key"] for prompt in run["prompts"]] == [False, True]
assert 950 < run["prompts"][1]["tokens"] < 1100 and run["prompts"][0]["compared_tokens"] == 4
full, sized, half, reference = run["rows"]
assert full["method"] == "none" and full["mean"]["largest_kl_nats"] < 1e-6
assert full["mean"]["keys"] == run["prompts"][1]["recalls_key"]
assert reference["options"] == "threshold 10 %" and "farther" not in reference
assert sized["budget"] == "as much as refreekv, threshold 10 %" and "farther" not in half
farther = 0
for own, other in zip(sized["of_prompts"], reference["of_prompts"]):
    assert abs(own["kept_fraction"] - other["kept_fraction"]) < 0.02, (own, other)
    farther += own["mean_kl_nats"] > other["mean_kl_nats"]
assert sized["farther"] == farther
EOF

[ $failures = 0 ] && echo "the command line behaves"
