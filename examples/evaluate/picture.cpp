// SPDX-License-Identifier: Apache-2.0
#include "picture.hpp"

#include <algorithm>
#include <sstream>

#include "gnuplot.hpp"

namespace evaluate {

namespace {

struct point {
  double kept;  // per cent
  double kl;
};

struct line {
  std::string name;
  bool joined;  // or points only
  std::vector<point> points;
};

// A logarithmic axis has no 0.
constexpr double smallest_kl = 1e-6;

std::vector<line> lines_of(const results& all) {
  std::vector<line> lines;
  for (const result_row& row : all.rows) {
    if (row.line.empty()) continue;
    auto drawn = std::find_if(lines.begin(), lines.end(),
                              [&](const line& each) { return each.name == row.line; });
    if (drawn == lines.end()) {
      const bool joined = !row.line.ends_with("other options");
      drawn = lines.insert(lines.end(), {row.line, joined, {}});
    }
    const measurement mean = all.mean(row);
    drawn->points.push_back(
        {100 * mean.kept_fraction, std::max(smallest_kl, mean.against_full.mean_kl)});
  }
  for (line& each : lines) {
    std::sort(each.points.begin(), each.points.end(),
              [](const point& a, const point& b) { return a.kept < b.kept; });
  }
  return lines;
}

constexpr const char* colours[] = {"#4477aa", "#ee6677", "#228833", "#ccbb44",
                                   "#66ccee", "#aa3377", "#bbbbbb", "#000000",
                                   "#ee7733", "#009988", "#882255", "#332288"};

}  // namespace

void draw(const results& all, const std::filesystem::path& base) {
  const std::vector<line> lines = lines_of(all);
  if (lines.empty()) throw std::runtime_error("the chosen methods have no line to draw");
  std::ostringstream gnuplot;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    gnuplot << "$line" << i << " << EOD\n";
    for (const point& each : lines[i].points) gnuplot << each.kept << ' ' << each.kl << '\n';
    gnuplot << "EOD\n";
  }
  gnuplot << "set border 3\nset tics nomirror out\nset grid y lc rgb '#dddddd'\n"
             "set xlabel 'tokens kept (%)'\nset xrange [0:100]\n"
             "set ylabel 'KL against the full cache (nats)'\nset logscale y\n"
             "set format y '10^{%L}'\nset key outside right top\n"
             "plot ";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    gnuplot << (i == 0 ? "" : ", ") << "$line" << i << " with "
            << (lines[i].joined ? "linespoints" : "points") << " lw 2 ps 0.7 pt " << 4 + i % 10
            << " lc rgb '" << colours[i % std::size(colours)] << "' title "
            << smollm2::quoted(lines[i].name) << " noenhanced";
  }
  gnuplot << "\nunset logscale\n";
  smollm2::draw_with_gnuplot(gnuplot.str(), {1000, 480}, base);
}

}  // namespace evaluate
