#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# run_on_device.sh OUTPUT_FOLDER [STEPS]: tests and measures on the device that is here, from the
# folder that bundle.sh left, wherever that lies. It needs a driver and xz; compute-sanitizer and
# ncu, where they are, for steps 2, 5, 6 and 8. STEPS are numbers and ranges, as in 0-3,5:
#   0 the device              5 counters of the kernels, against what they should be
#   1 device tests            6 races, barriers and uninitialised memory of a batch of layers
#   2 memory errors of them   7 tests of every backend, a process for each tag
#   3 llama3_8b, 8,192        8 memory errors of the contract
#   4 larger ones             9 windows, 8-bit keys, pages, one layer, spare capacity
# A line for each step, also in summary.txt. Returns 0 where all passed or were skipped, 1 where one
# is red, 77 where there is no device.
set -uo pipefail
usage() { sed -n '3,12s/^# //p' "$0" >&2; exit 2; }
if [ $# -lt 1 ] || [ $# -gt 2 ]; then usage; fi
selected=' '
IFS=, read -ra ranges <<< "${2-0-9}"
for range in "${ranges[@]}"; do
  [[ $range =~ ^[0-9](-[0-9])?$ ]] || usage
  for step in $(seq "${range%-*}" "${range#*-}"); do selected+="$step "; done
done

here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
export REFREEKV_GOLDEN=$here/golden LD_LIBRARY_PATH=$here${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
PATH=$PATH:/usr/local/cuda/bin

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }
has() { command -v "$1" > /dev/null; }

# run LIMIT COMMAND...: its output goes to the step's file, and to $work/output. Its status; `how` is
# that in words.
run() {
  local limit=$1 status
  shift
  printf '\n$ %s\n' "$*" >> "$log"
  { timeout -k 10 "$limit" "$@" > "$work/output" 2>&1 < /dev/null; } 2> /dev/null  # "Aborted"
  status=$?
  if [ "$(stat -c %s "$work/output")" -gt 3000000 ]; then
    { head -c 1000000 "$work/output"; printf '\n[...]\n'; tail -c 1000000 "$work/output"; } >> "$log"
  else
    cat "$work/output" >> "$log"
  fi
  printf '[status %d]\n' "$status" >> "$log"
  case $status in
    0) how=passes ;;
    124 | 137) how="cut after $limit s" ;;
    12[67]) how="does not start" ;;
    *) how="status $status" ;;
  esac
  [ $status -le 128 ] || [ $status -eq 137 ] || how="signal $((status - 128))"
  return $status
}

# What a step ends in: the first red stays.
verdict='' details=''
passed() { verdict=${verdict:-PASS}; details+="${details:+; }$*"; }
red() { verdict=RED; details+="${details:+; }$*"; }
skipped() { verdict=${verdict:-SKIPPED}; details+="${details:+; }$*"; }
failures=0
# step NUMBER WHAT FUNCTION
step() {
  [[ $selected == *" $1 "* ]] || return 0
  local begin=$SECONDS
  log=$out/step$1.txt verdict='' details=''
  : > "$log"
  $3
  say "$(printf 'step %s  %-42s %-7s %4d s  (%s)' "$1" "$2" "$verdict" $((SECONDS - begin)) "$details")"
  [ "$verdict" = RED ] || return 0
  failures=$((failures + 1))
  case $1 in 1 | 2) say "step $1 is red: nothing after it means anything" ;; esac
}

program() {  # unpacked once
  [ -x "$work/$1" ] || { xz -dc "$here/$1.xz" > "$work/$1" && chmod +x "$work/$1"; }
  printf '%s' "$work/$1"
}

describe() {
  cat "$work/device" >> "$log"
  run 20 nvidia-smi
  run 20 nvidia-smi -q -d CLOCK
  for tool in compute-sanitizer ncu; do
    if has $tool; then run 20 $tool --version; else echo "no $tool" >> "$log"; fi
  done
  passed "$(head -1 "$work/device")"
}

device_tests() {
  local tests failed='' loaded blocking
  tests=$(program refreekv_device_tests)
  for seed in 1 2 3; do
    run 120 env REFREEKV_SEED=$seed "$tests" -d yes && continue
    failed+=" $seed"
    red "seed $seed $how $(tail -2 "$work/output" | tr -s '\n' ' ')"
    [[ $how != cut* ]] || break  # the next ones would hang as long
  done
  [ -n "$failed" ] || { passed "three seeds"; return; }
  # Red under lazy loading alone: code is loaded during a capture. Red unless launches wait: a race.
  seed=${failed##* }
  run 120 env REFREEKV_SEED="$seed" CUDA_MODULE_LOADING=EAGER "$tests" -d yes
  loaded=$how
  run 120 env REFREEKV_SEED="$seed" CUDA_LAUNCH_BLOCKING=1 "$tests" -d yes
  blocking=$how
  red "with CUDA_MODULE_LOADING=EAGER: $loaded, with CUDA_LAUNCH_BLOCKING=1: $blocking"
}

# sanitize LIMIT TOOL COMMAND...: tests fail on errors of the API by themselves, and cause some.
sanitize() {
  local limit=$1 tool=$2
  shift 2
  has compute-sanitizer || { skipped "no compute-sanitizer"; return; }
  if run "$limit" compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 "$@"; then
    passed "$tool: none"
  else
    red "$tool: $how, $(grep -o 'ERROR SUMMARY.*\|RACECHECK SUMMARY.*' "$work/output" | tail -1)"
  fi
}
memory_errors() { sanitize 170 memcheck "$(program refreekv_device_tests)"; }
races() {
  local tool
  has compute-sanitizer || { skipped "no compute-sanitizer"; return; }
  for tool in racecheck synccheck initcheck; do
    sanitize 100 $tool "$(program refreekv_device_tests)" 'layers in one batch*'
  done
}
contract_memory_errors() {
  REFREEKV_SEED=1 sanitize 170 memcheck "$(program refreekv_pinned_tests)" '[contract]'
}

# rows JSON: of each row that was measured its name, ms and share of the limit.
rows() {
  awk -F'": ' '
    function end() { if (name != "" && !failed) printf "%s %.4f ms, %.1f %% of the limit\n", name, ms, 100 * share; name = "" }
    /"name": "cuda/ { end(); split($2, part, "\""); name = part[2]; failed = 0; ms = share = 0 }
    /"error_occurred": true/ { failed = 1 }
    /"ms":/ { ms = $2 + 0 }
    /"of_limit":/ { share = $2 + 0 }
    END { end() }' "$1"
}
# measure LIMIT FILTER: what does not fit into the device's memory is left out.
measure() {
  local json=${log%.txt}.json errors
  rm -f "$json"
  run "$1" "$(program refreekv_cuda_bench)" --benchmark_filter="$2" --benchmark_min_time=0.2 \
    --benchmark_out="$json" || red "$how"
  [ -s "$json" ] || { red "no rows"; return; }
  rows "$json" >> "$log"
  errors=$(grep '"error_message"' "$json" | grep -cv 'do not fit')
  [ "$errors" -eq 0 ] || red "$errors rows failed: $(grep -m1 '"error_message"' "$json" | tr -s ' ')"
  [ -n "$(rows "$json")" ] || { red "no rows"; return; }
  passed "$(rows "$json" | grep -c .) rows; $(rows "$json" | grep -m1 select)"
}
measure_8b() {
  measure 170 '/llama3_8b/(batched|batched_graph|one_by_one_graph)/tokens:8192/batch:1/'
}
measure_larger() {
  measure 240 '/(llama3_70b/batched/tokens:8192/batch:1|llama3_8b/batched/tokens:131072/batch:1|llama3_8b/batched/tokens:8192/batch:16)/'
}
measure_others() { measure 300 '/llama3_8b/(one_layer|batched_(window|fp8|paged|capacity))'; }

# The kernels of the first calls of select on llama3_8b, 32 layers of 8,192 tokens. The slowest is
# the one that reads the keys: 2^20 times 512 bytes, for each of which an H100 has 118 warp
# instructions at a usual rate of issue. More than one block has to share a multiprocessor.
counters() {
  has ncu || { skipped "no ncu"; return; }
  local metrics=gpu__time_duration.sum,sm__inst_executed.sum
  metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active
  metrics+=,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,launch__occupancy_limit_shared_mem
  metrics+=,smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio
  run 280 ncu --csv --page raw --print-units base --clock-control none -k regex:run_body -c 14 \
    --metrics "$metrics" "$(program refreekv_cuda_bench)" --benchmark_min_time=0.01 \
    --benchmark_filter='cuda/select/llama3_8b/batched/tokens:8192/batch:1/'
  if grep -q ERR_NVGPUCTRPERM "$work/output"; then skipped "no permission to read counters"; return; fi
  [ "$how" = passes ] || red "ncu: $how"
  awk '
    function number(i) { gsub(/,/, "", field[i]); return field[i] + 0 }
    !/^"/ { next }
    { line = $0; sub(/^"/, "", line); sub(/"\r?$/, "", line); n = split(line, field, /","/) }
    field[1] == "ID" { for (i = 1; i <= n; ++i) column[field[i]] = i; next }
    field[1] == "" || !("gpu__time_duration.sum" in column) { next }
    {
      us = number(column["gpu__time_duration.sum"]) / 1000
      all += us; ++kernels
      if (us <= most) next
      most = us
      inst = number(column["sm__inst_executed.sum"]) / 1048576
      issue = number(column["smsp__issue_active.avg.pct_of_peak_sustained_active"])
      dram = number(column["dram__throughput.avg.pct_of_peak_sustained_elapsed"])
      conflicts = number(column["l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"]) / 1048576
      blocks = number(column["launch__occupancy_limit_shared_mem"])
      stalled = number(column["smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio"])
    }
    END {
      if (kernels == 0) { print "RED no kernels"; exit }
      bound = dram >= 80 ? "memory" : issue >= 65 ? "issue" : "latency"
      print (blocks < 2 || conflicts > 1 ? "RED" : "PASS"), \
        sprintf("slowest of %d kernels %.1f of %.1f us: bound by %s, dram %.0f %%, issue active %.0f %%, for each 512 bytes %.1f instructions (118 are affordable) and %.2f bank conflicts (at most 1), short scoreboard %.2f, shared memory has room for %d blocks (2 at least)",
          kernels, most, all, bound, dram, issue, inst, conflicts, stalled, blocks)
    }' "$work/output" > "$work/counters"
  cat "$work/counters" >> "$log"
  local words
  words=$(cut -d' ' -f2- "$work/counters")
  if grep -q ^PASS "$work/counters"; then passed "$words"; else red "$words"; fi
}

shared_tests() {
  local tests tag tags
  tests=$(program refreekv_pinned_tests)
  run 20 "$tests" --list-tags
  mapfile -t tags < <(grep -o '\[[a-z_0-9]*\]' "$work/output" | sort -u)
  [ ${#tags[@]} -gt 0 ] || { red "no tests"; return; }
  for tag in "${tags[@]}"; do run 100 "$tests" "$tag" -d yes || red "$tag $how"; done
  passed "${#tags[@]} tags"
}

timeout -k 10 60 "$here/probe" > "$work/device" 2>&1 < /dev/null
case $? in
  0) ;;
  77) say "$(head -1 "$work/device"): nothing was tested"; exit 77 ;;
  *) say "the probe does not run: $(head -1 "$work/device")"; exit 1 ;;
esac
say "$(head -1 "$work/device"), revision $(cat "$here/revision" 2> /dev/null || echo unknown)"

step 0 "the device" describe
step 1 "device tests" device_tests
step 2 "memory errors of the device tests" memory_errors
step 3 "llama3_8b, 8,192 tokens" measure_8b
step 4 "larger models, prompts and batches" measure_larger
step 5 "counters of select" counters
step 6 "races and barriers of a batch of layers" races
step 7 "tests of every backend" shared_tests
step 8 "memory errors of the contract" contract_memory_errors
step 9 "windows, 8-bit keys, pages, one layer" measure_others
[ $failures -eq 0 ]
