#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# bench/run.sh [BENCHMARK_ARGUMENT...]: builds the benchmarks for this machine in build/bench, runs
# the rows of README.md here (or those that --benchmark_filter=... names) and draws them: roofline and
# scaling, as .svg and .png, in build/bench.
set -euo pipefail
cd "$(dirname "$0")/.."

tests/install_packages.sh libeigen3-dev libbenchmark-dev gnuplot-nox python3
command -v ninja > /dev/null && export CMAKE_GENERATOR="${CMAKE_GENERATOR-Ninja}"
cmake -S . -B build/bench -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS=-march=native \
  -DREFREEKV_TESTS=OFF -DREFREEKV_EXAMPLES=OFF
cmake --build build/bench --parallel "$(nproc)"

rows='select/(llama3_8b/|qwen2_5_7b/bf16/.*:(8192|131072)/|smollm2/(bf16|fp32)/.*:8192/)'
rows+='|(paged16|prune)/(llama3_8b|smollm2)/(bf16|fp32)/.*:(8192|131072)/|eigen/llama3_8b/'
build/bench/bench/refreekv_bench --benchmark_filter="$rows" --benchmark_out=build/bench/rows.json "$@"

# model, keys, cache, tokens, threads, microseconds, roofline, the limit's microseconds of each row
python3 - << 'EOF' > build/bench/select.txt
import json
for row in json.load(open("build/bench/rows.json"))["benchmarks"]:
    name = row["name"].split("/")
    if name[0] == "select" and not row.get("error_occurred"):
        tokens, threads = (part.split(":")[1] for part in name[4:6])
        print(*name[1:4], tokens, threads, row["real_time"], row["roofline"], row["roofline_us"])
EOF

# Bars of the rows with 8,192 and 131,072 tokens, two for each: one thread and two.
awk '$4 == 8192 || $4 == 131072 {
       name = $1 " " $2 ", " $4 ($4 == 8192 ? " " $3 : "")
       gsub("_", "-", name)
       if (!(name in at)) { at[name] = ++n; names[n] = name }
       ratio[name, $5] = $7
     }
     END { for (i = 1; i <= n; i++) print "\"" names[i] "\"", ratio[names[i], 1], ratio[names[i], 2] }' \
  build/bench/select.txt > build/bench/roofline.txt

for terminal in svg pngcairo; do
  extension=${terminal%cairo}
  gnuplot << EOF
set terminal $terminal size 900,520 font "sans,12" background "white"
set output "build/bench/roofline.$extension"
set title "Time of a decision / time of the slower limit: reading the keys once, or the multiply-adds"
set style data histograms
set style fill solid border -1
set xtics rotate by 40 right scale 0
set yrange [0:*]
set bmargin 9
set lmargin 14
set key top left
set grid ytics
plot "build/bench/roofline.txt" using 2:xtic(1) title "1 thread" linecolor rgb "#4477aa", \
     "" using 3 title "2 threads" linecolor rgb "#ddaa33", 1 title "" linecolor rgb "black"

set output "build/bench/scaling.$extension"
set title "One layer of llama3-8b on one thread: a decision (solid) and the limit (dashed)"
set xlabel "tokens"
set ylabel "ns for each token"
set logscale x 2
set xrange [1024:1048576]
set format x "%.0f"
unset bmargin
unset lmargin
set rmargin 6
set xtics autofreq norotate center
set key outside top center horizontal
row(type) = sprintf("< awk '\$1 == \"llama3_8b\" && \$2 == \"%s\" && \$3 == \"hot\" && \$5 == 1' build/bench/select.txt | sort -n -k4", type)
array types[3] = ["fp32", "fp16", "bf16"]
array colors[3] = [0xcc6677, 0xddaa33, 0x4477aa]
plot for [i = 1:3] row(types[i]) using 4:(1000 * \$6 / \$4) with linespoints pointtype 7 linecolor rgb colors[i] title types[i], \
     for [i = 1:3] row(types[i]) using 4:(1000 * \$8 / \$4) with lines dashtype 2 linecolor rgb colors[i] title ""
EOF
done
echo "pictures: build/bench/roofline.svg, build/bench/scaling.svg (and .png)"
