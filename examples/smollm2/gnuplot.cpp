// SPDX-License-Identifier: Apache-2.0
#include "gnuplot.hpp"

#include <csignal>
#include <cstdio>
#include <stdexcept>
#include <tuple>

#include "files.hpp"

namespace smollm2 {

std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? "''" : std::string(1, c);
  return result + "'";
}

void draw_with_gnuplot(const std::string& commands, picture_size size,
                       const std::filesystem::path& base) {
  const std::string pixels = std::to_string(size.width) + ',' + std::to_string(size.height);
  std::string script;
  for (const auto& [terminal, options, ending] :
       {std::tuple{"svg", " background 'white'", ".svg"}, std::tuple{"pngcairo", "", ".png"}}) {
    const std::string path = base.string() + ending;
    write_file(path, "");  // gnuplot would draw on stdout where it cannot write
    script += std::string("set terminal ") + terminal + " size " + pixels + options +
              " font 'sans,11'\nset output " + quoted(path) + '\n' + commands + "set output\n";
  }
  std::signal(SIGPIPE, SIG_IGN);  // with no gnuplot there is nobody to read: pclose says so
  std::FILE* gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr) throw std::runtime_error("cannot start gnuplot");
  std::fwrite(script.data(), 1, script.size(), gnuplot);
  if (pclose(gnuplot) != 0) {
    throw std::runtime_error("gnuplot could not draw " + base.string() + ".svg and .png");
  }
}

}  // namespace smollm2
