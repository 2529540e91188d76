# SPDX-License-Identifier: Apache-2.0
# Sourced by the tests of programs' command lines, with the program as $1: a folder $work that goes
# away, a count of $failures, and `refuses`.
program=$1
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
failures=0

# refuses CODE TEXT ARGUMENT...: exit code, one line on stderr that has TEXT, nothing on stdout.
refuses() {
  local code=$1 text=$2 got
  shift 2
  "$program" "$@" > "$work/out" 2> "$work/err"
  got=$?
  if [ $got != "$code" ] || [ "$(wc -l < "$work/err")" != 1 ] || ! grep -q -- "$text" "$work/err" ||
     [ -s "$work/out" ]; then
    echo "${program##*/} $*: exit code $got, expected $code and one line with '$text':"
    cat "$work/out" "$work/err"
    failures=$((failures + 1))
  fi
}
