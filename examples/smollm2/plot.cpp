// SPDX-License-Identifier: Apache-2.0
#include "plot.hpp"

#include <sstream>

#include "gnuplot.hpp"

namespace smollm2 {

namespace {

// Both panels.
std::string panels(const report& run, const loss_picture& loss) {
  const layer_pruning& layer = run.layers[loss.layer];
  std::ostringstream gnuplot;
  gnuplot << "$kept << EOD\n";
  for (std::size_t i = 0; i < run.layers.size(); ++i) {
    gnuplot << i << ' ' << 100 * run.layers[i].kept_fraction() << '\n';
  }
  gnuplot << "EOD\n$loss << EOD\n";
  for (const curve_point& point : loss.curve) {
    gnuplot << point.cut << ' ' << 100 * point.loss << '\n';
  }
  gnuplot << "EOD\n$cut << EOD\n";
  for (const auto& kept : layer.kept) gnuplot << kept.cut << ' ' << 100 * kept.loss << '\n';
  gnuplot << "EOD\n"
             "set multiplot layout 1,2\n"
             "set border 3\nset tics nomirror out\nset grid y lc rgb '#dddddd'\n"
             "set style fill solid\nset boxwidth 0.8\n"
             "set title '"
          << run.prompt_tokens << " tokens: what each layer keeps'\n"
          << "set xlabel 'layer'\nset ylabel 'tokens kept (%)'\nset yrange [0:100]\nset xrange [-1:"
          << run.layers.size() << "]\n"
          << "plot $kept with boxes lc rgb '#4477aa' notitle\n"
             "set title 'layer "
          << loss.layer << ": loss of the norm'\n"
          << "set xlabel 'cut: first kept token after the sinks'\nset ylabel 'loss (%)'\n"
             "set xrange [0:"
          << run.prompt_tokens
          << "]\nset logscale y\nset yrange [0.01:100]\nset key top left\n"
             "plot $loss with lines lw 2 lc rgb '#4477aa' title 'loss', "
          << 100 * loss.threshold
          << " with lines dt 2 lc rgb '#888888' title 'threshold', "
             "$cut with points pt 7 ps 1.2 lc rgb '#cc3311' title 'cut'\n"
             "unset multiplot\nunset logscale\n";
  return gnuplot.str();
}

}  // namespace

void draw(const report& run, const loss_picture& loss, const std::filesystem::path& base) {
  draw_with_gnuplot(panels(run, loss), {1000, 360}, base);
}

}  // namespace smollm2
