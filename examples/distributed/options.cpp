// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <CLI/CLI.hpp>
#include <map>
#include <sstream>

namespace distributed {

namespace {

const std::map<std::string, layout> layouts{{"heads", layout::heads},
                                            {"tokens", layout::tokens},
                                            {"zigzag", layout::zigzag},
                                            {"grid", layout::grid}};
const std::map<std::string, refreekv::row_average> averages{
    {"mean", refreekv::row_average::mean}, {"frobenius", refreekv::row_average::frobenius}};

std::map<std::string, geometry> shapes() {
  std::map<std::string, geometry> all;
  for (const geometry& shape : geometries) all.emplace(shape.name, shape);
  return all;
}

}  // namespace

const char* name_of(layout kind) {
  for (const auto& [name, value] : layouts) {
    if (value == kind) return name.c_str();
  }
  return "";
}

std::optional<options> parse(int argc, char** argv, index_t ranks, bool talks, int& exit_code) {
  options o;
  CLI::App app(
      "Prunes layers whose heads or tokens are split over all ranks, and compares\n"
      "each cut with a single rank's. Fails where one differs.");
  app.add_option("--layout", o.layouts, "heads, tokens, zigzag, grid; all of them by default")
      ->transform(CLI::CheckedTransformer(layouts));
  std::string shape(o.shape.name);
  app.add_option("--geometry", shape, "llama3_8b, llama3_1b or smollm2")
      ->check(CLI::IsMember(shapes()))
      ->capture_default_str();
  app.add_option("--tokens", o.tokens)->check(CLI::Range(1, 1 << 24))->capture_default_str();
  app.add_option("--layers", o.layers)->check(CLI::Range(1, 1000))->capture_default_str();
  app.add_option("--window", o.window, "last queries that are looked at")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--average", o.average, "mean or frobenius, of a window")
      ->transform(CLI::CheckedTransformer(averages));
  app.add_option("--from", o.fewest, "begin with so few ranks, not with all")
      ->check(CLI::Range(index_t{1}, ranks));
  app.add_flag("--time", o.timed, "measure, besides");
  app.failure_message(
      [](const CLI::App*, const CLI::Error& error) { return std::string(error.what()) + "\n"; });
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::ostringstream out, err;
    const bool is_help = app.exit(error, out, err) == 0;
    exit_code = is_help ? 0 : 2;
    if (talks) (is_help ? std::cout : std::cerr) << out.str() << err.str();
    return std::nullopt;
  }
  o.shape = shapes().at(shape);
  o.window = std::min(o.window, o.tokens);
  return o;
}

}  // namespace distributed
