// SPDX-License-Identifier: Apache-2.0
#include "plot.hpp"

#include <csignal>
#include <cstdio>
#include <sstream>
#include <stdexcept>

namespace smollm2 {

namespace {

// Both panels, for any terminal.
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
  std::ostringstream script;
  for (const auto& [terminal, ending] : {std::pair{"svg size 1000,360 background 'white'", ".svg"},
                                         {"pngcairo size 1000,360", ".png"}}) {
    // gnuplot doubles a quote inside quotes.
    std::string path;
    for (const char c : base.string() + ending) path += c == '\'' ? "''" : std::string(1, c);
    script << "set terminal " << terminal << " font 'sans,11'\nset output '" << path << "'\n"
           << panels(run, loss) << "set output\n";
  }
  std::signal(SIGPIPE, SIG_IGN);  // with no gnuplot there is nobody to read: pclose says so
  std::FILE* gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr) throw std::runtime_error("cannot start gnuplot");
  const std::string text = script.str();
  std::fwrite(text.data(), 1, text.size(), gnuplot);
  if (pclose(gnuplot) != 0) {
    throw std::runtime_error("gnuplot could not draw " + base.string() + ".svg and .png");
  }
}

}  // namespace smollm2
