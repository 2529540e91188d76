// SPDX-License-Identifier: Apache-2.0
#include "llama_cpp_options.hpp"

#include "command_line.hpp"
#include "pooled_cut.hpp"

namespace llama_cpp {

std::optional<program_options> parse_options(int argc, char** argv) {
  program_options result;
  smollm2::run_options shared;

  CLI::App app("Runs a model in llama.cpp and prunes its cells, which all layers share.");
  shared.add_to(app);
  const CLI::CheckedTransformer type(
      std::vector<std::pair<std::string, ggml_type>>{{"f32", GGML_TYPE_F32},
                                                     {"f16", GGML_TYPE_F16},
                                                     {"bf16", GGML_TYPE_BF16},
                                                     {"q8_0", GGML_TYPE_Q8_0}});
  const CLI::CheckedTransformer on_or_off(
      std::vector<std::pair<std::string, bool>>{{"on", true}, {"off", false}});
  app.add_option("--keys", result.context.keys, "elements of the cached keys")
      ->transform(type)
      ->default_str("f16");
  app.add_option("--values", result.context.values, "elements of the cached values")
      ->transform(type)
      ->default_str("f16");
  app.add_option("--flash-attention", result.context.flash_attention)
      ->transform(on_or_off)
      ->default_str("on");
  if (!smollm2::parse(app, argc, argv)) return std::nullopt;

  static_cast<smollm2::run_settings&>(result) = shared.settings();
  result.context.threads = result.threads;
  if (const char* reason = why_unpoolable(result.policy)) throw smollm2::usage_error(reason);
  return result;
}

}  // namespace llama_cpp
