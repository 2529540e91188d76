// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <charconv>
#include <system_error>

#include "command_line.hpp"

namespace smollm2 {

namespace {

// "0:40" is tokens 0 to 39.
refreekv::token_range parse_range(const std::string& text) {
  refreekv::token_range range{};
  const char* end = text.data() + text.size();
  const auto [colon, bad] = std::from_chars(text.data(), end, range.begin);
  if (bad == std::errc{} && colon != end && *colon == ':') {
    const auto [last, also_bad] = std::from_chars(colon + 1, end, range.end);
    if (also_bad == std::errc{} && last == end && 0 <= range.begin && range.begin < range.end) {
      return range;
    }
  }
  throw usage_error("--protect wants BEGIN:END, not '" + text + "'");
}

}  // namespace

std::optional<options> parse_options(int argc, char** argv) {
  options result;
  run_options shared;

  CLI::App app(
      "Runs SmolLM2 with a key/value cache that refreekv prunes after each layer's prefill.");
  std::vector<std::string> ranges;
  shared.add_to(app);
  app.add_option("--then", result.replies, "a further message after the answer; may be repeated");
  app.add_option("--protect", ranges,
                 "tokens that stay, as positions BEGIN:END in the conversation; may be repeated");
  app.add_option("--prune-every", result.prune_every,
                 "prune while decoding, too: after every so many tokens of an answer")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20))
      ->default_str("after prompts only");
  app.add_option("--plot", result.plot, "draw FILE.svg and FILE.png (needs gnuplot)");
  app.add_option("--plot-layer", result.plot_layer,
                 "layer whose loss curve is drawn (default: the middle one)");
  if (!parse(app, argc, argv)) return std::nullopt;

  static_cast<run_settings&>(result) = shared.settings();
  for (const std::string& range : ranges) result.protect.push_back(parse_range(range));
  if (!result.protect.empty() && !keeps_ranges(result.policy)) {
    throw usage_error("--protect needs a policy that keeps a range");
  }
  if (!result.replies.empty() && std::holds_alternative<refreekv::policy::cake>(result.policy)) {
    throw usage_error("cake shares its budget among layers of one length: no --then");
  }
  if (result.prune_every > 0 && std::holds_alternative<refreekv::policy::cake>(result.policy)) {
    throw usage_error("cake shares its budget among layers of one length: no --prune-every");
  }
  if (!result.plot.empty() && !std::holds_alternative<refreekv::policy::refreekv>(result.policy)) {
    throw usage_error("--plot needs --policy refreekv");
  }
  return result;
}

}  // namespace smollm2
