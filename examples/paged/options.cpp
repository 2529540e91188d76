// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <thread>

#include "command_line.hpp"
#include "files.hpp"
#include "policy_options.hpp"

namespace paged {
namespace {

page_policy policy_of(const smollm2::pruning_policy& chosen, bool scope_given) {
  if (const auto* range = std::get_if<refreekv::policy::refreekv>(&chosen)) return *range;
  const auto* faithful = std::get_if<refreekv::policy::faithful>(&chosen);
  if (faithful == nullptr) throw smollm2::usage_error("pages need --policy refreekv or faithful");
  if (scope_given && faithful->scope == refreekv::cut_scope::kv_head) {
    throw smollm2::usage_error("KV heads share pages, so faithful has --scope layer here");
  }
  return *faithful;
}

}  // namespace

std::optional<options> parse_options(int argc, char** argv) {
  options result;
  smollm2::policy_options policies;
  std::string question;
  std::filesystem::path a, b, c;
  result.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));

  CLI::App app(
      "Serves three sequences from one pool of pages: B shares its beginning with A, A is pruned, "
      "and C lives in the pages that A returned.");
  app.option_defaults()->always_capture_default();
  app.add_option("--model", result.model, "a Llama model in GGUF")->required();
  app.add_option("--prompt-file", a, "A's text")->required();
  app.add_option("--sharing-file", b, "B's text, which begins as A's does");
  app.add_option("--next-file", c, "C's text");
  app.add_option("--question", question, "text to append to A's and B's");
  app.add_option("--page-tokens", result.page_tokens, "tokens of a page")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option("--tokens", result.tokens, "tokens to generate")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  app.add_option("--threads", result.threads)->check(CLI::Range(1, 1024));
  app.add_flag("--speed", result.speed,
               "instead of serving: measure A's tokens/s, full and pruned, in alternating runs");
  policies.add_to(app);
  if (!smollm2::parse(app, argc, argv)) return std::nullopt;

  result.policy = policy_of(policies.chosen(), app.count("--scope") > 0);
  if (!result.speed && (b.empty() || c.empty())) {
    throw smollm2::usage_error("--sharing-file and --next-file are needed to serve");
  }
  const std::string end = question.empty() ? "" : "\n\n" + question;
  result.a = smollm2::read_file(a) + end;
  if (result.speed) return result;
  result.b = smollm2::read_file(b) + end;
  result.c = smollm2::read_file(c);
  return result;
}

}  // namespace paged
