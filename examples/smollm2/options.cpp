// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <CLI/CLI.hpp>
#include <fstream>
#include <iostream>
#include <iterator>
#include <thread>

namespace smollm2 {

namespace {

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) {
    throw std::runtime_error("cannot read " + path.string());
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

std::optional<options> parse_options(int argc, char** argv, int& exit_code) {
  namespace kv = refreekv;
  options result;
  kv::policy::refreekv refreekv_rule;
  kv::policy::streaming_llm streaming_rule;
  std::string text, question, policy = "refreekv";
  std::filesystem::path prompt_file;
  result.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));

  CLI::App app(
      "Runs SmolLM2 with a key/value cache that refreekv prunes after each layer's prefill.");
  app.option_defaults()->always_capture_default();
  app.add_option("--model", result.model, "a Llama model in GGUF")->required();
  auto* source = app.add_option_group("prompt")->require_option(1);
  source->add_option("--prompt", text, "the prompt's text");
  source->add_option("--prompt-file", prompt_file, "a file with the prompt's text");
  app.add_option("--question", question, "text to append to the prompt");
  app.add_option("--tokens", result.tokens, "tokens to generate")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option("--threads", result.threads)->check(CLI::Range(1, 1024));
  app.add_flag("--compare", result.compare,
               "measure against the unpruned cache over the tokens that it generates");
  app.add_option("--json", result.json, "write all results to this file");
  app.add_option("--plot", result.plot, "draw FILE.svg and FILE.png (needs gnuplot)");
  app.add_option("--plot-layer", result.plot_layer,
                 "layer whose loss curve is drawn (default: the middle one)");

  app.add_option("--policy", policy)->check(CLI::IsMember({"refreekv", "streaming_llm", "none"}));
  app.add_option("--threshold", refreekv_rule.threshold, "share of the norm that may go, in [0, 1]")
      ->group("refreekv");
  app.add_option("--sinks", refreekv_rule.sinks, "first tokens that always stay")
      ->group("refreekv and streaming_llm");
  app.add_option("--window", refreekv_rule.window, "last queries that are looked at")
      ->group("refreekv");
  const auto one_of = [&](const char* name, auto& target, auto values) {
    app.add_option(name, target)
        ->transform(CLI::CheckedTransformer(values))
        ->default_str(values.begin()->first)
        ->group("refreekv");
  };
  using averages = std::vector<std::pair<std::string, kv::row_average>>;
  one_of("--average", refreekv_rule.average,
         averages{{"mean", kv::row_average::mean}, {"frobenius", kv::row_average::frobenius}});
  using norms = std::vector<std::pair<std::string, kv::norm_scope>>;
  one_of("--norm", refreekv_rule.norm,
         norms{{"candidates", kv::norm_scope::candidates}, {"full_row", kv::norm_scope::full_row}});
  using scopes = std::vector<std::pair<std::string, kv::cut_scope>>;
  one_of("--scope", refreekv_rule.scope,
         scopes{{"layer", kv::cut_scope::layer}, {"kv_head", kv::cut_scope::kv_head}});
  app.add_option("--full-layers", refreekv_rule.full_layers, "first layers that are not pruned")
      ->group("refreekv");
  app.add_option("--recent", streaming_rule.recent, "tokens to keep besides the sinks")
      ->group("streaming_llm");
  app.add_option("--room", streaming_rule.room, "tokens about to come that must fit")
      ->group("streaming_llm");

  const auto fail = [&](const std::string& why, int code) {
    std::cerr << "smollm2: " << why << '\n';
    exit_code = code;
    return std::nullopt;
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    exit_code = app.exit(help);
    return std::nullopt;
  } catch (const CLI::ParseError& error) {
    return fail(std::string(error.what()) + " (see --help)", 2);
  }
  streaming_rule.sinks = refreekv_rule.sinks;
  if (policy == "refreekv") result.rule = refreekv_rule;
  if (policy == "streaming_llm") result.rule = streaming_rule;
  if (policy == "none") result.rule = keep_everything{};
  if (const char* why = why_invalid(result.rule)) return fail(why, 2);
  if (!result.plot.empty() && policy != "refreekv")
    return fail("--plot needs --policy refreekv", 2);
  try {
    result.prompt = prompt_file.empty() ? text : read_file(prompt_file);
  } catch (const std::runtime_error& error) {
    return fail(error.what(), 1);
  }
  if (!question.empty()) result.prompt += "\n\n" + question;
  return result;
}

}  // namespace smollm2
