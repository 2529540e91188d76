#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# command_line_test.sh PAGED MODEL PROMPTS: on the real model everything holds that the program
# checks, pages come back and C is in them; bad input gets one line and its exit code.
set -uo pipefail
model=$2 prompts=$3
. "$(dirname "$0")/../command_line.sh"

head -c 1200 "$prompts/definitions.txt" > "$work/beginning.txt"
files=(--prompt-file "$prompts/definitions.txt" --sharing-file "$work/beginning.txt"
  --next-file "$prompts/eggs.txt")
run=(--model "$model" "${files[@]}" --tokens 8)
refuses 1 "no such file" --model "$work/none.gguf" "${files[@]}"
refuses 1 "cannot read" --model "$model" --prompt-file "$work/none.txt" --sharing-file x --next-file x
refuses 2 "page-tokens" "${run[@]}" --page-tokens 0
refuses 2 "threshold must be in" "${run[@]}" --threshold 2
refuses 2 "pages need --policy refreekv or faithful" "${run[@]}" --policy snapkv
refuses 2 "--scope layer here" "${run[@]}" --policy faithful --scope kv_head
refuses 2 "tolerance must be in" "${run[@]}" --policy faithful --tolerance 2
refuses 2 "sharing-file" --model "$model" --prompt-file x --next-file x

for policy in refreekv faithful; do
  before=$failures
  "$program" "${run[@]}" --question "Who is a Licensor?" --policy $policy > "$work/out" ||
    failures=$((failures + 1))
  promised=$(sed -n 's/^promised \([0-9]*\) bytes, .*/\1/p' "$work/out")
  returned=$(sed -n 's/^promised .*, \([0-9]*\) came back.*/\1/p' "$work/out")
  if [ "${promised:-0}" = 0 ] || [ "$promised" != "$returned" ] ||
     ! grep -q "no byte was written" "$work/out" || ! grep -q "^C needs .* is refused *0$" "$work/out"; then
    failures=$((failures + 1))
  fi
  [ $failures = $before ] || cat "$work/out"
done
"$program" --model "$model" --prompt-file "$prompts/eggs.txt" --speed --policy faithful > "$work/out" ||
  failures=$((failures + 1))
grep -q "^pruned cache .* tokens/s" "$work/out" || { cat "$work/out"; failures=$((failures + 1)); }
[ $failures = 0 ] && echo "pages come back, and others live in them"
