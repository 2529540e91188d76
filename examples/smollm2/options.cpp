// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include "command_line.hpp"

namespace smollm2 {

std::optional<options> parse_options(int argc, char** argv) {
  options result;
  run_options shared;

  CLI::App app(
      "Runs SmolLM2 with a key/value cache that refreekv prunes after each layer's prefill.");
  shared.add_to(app);
  app.add_option("--plot", result.plot, "draw FILE.svg and FILE.png (needs gnuplot)");
  app.add_option("--plot-layer", result.plot_layer,
                 "layer whose loss curve is drawn (default: the middle one)");
  if (!parse(app, argc, argv)) return std::nullopt;

  static_cast<run_settings&>(result) = shared.settings();
  if (!result.plot.empty() && !std::holds_alternative<refreekv::policy::refreekv>(result.rule)) {
    throw usage_error("--plot needs --policy refreekv");
  }
  return result;
}

}  // namespace smollm2
