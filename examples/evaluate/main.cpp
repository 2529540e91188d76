// SPDX-License-Identifier: Apache-2.0
// Compares refreekv's methods on a real model: what each keeps, and how its predictions change.
#include <algorithm>
#include <functional>
#include <iostream>

#include "command_line.hpp"
#include "loaded_model.hpp"
#include "pass_keys.hpp"
#include "picture.hpp"
#include "plan.hpp"
#include "progress_bar.hpp"
#include "prompt_files.hpp"
#include "tables.hpp"

namespace {

using namespace evaluate;

// Prompts that cannot be used are left out, with a word on stderr.
std::vector<tokenized_prompt> prompts_of(const options& opts, const smollm2::loaded_model& model) {
  const std::size_t context = model.network.config().context;
  if (opts.tokens >= context) {
    throw std::runtime_error("--tokens: the model's context is " + std::to_string(context));
  }
  const std::size_t longest = std::min(opts.max_tokens.value_or(context), context - opts.tokens);

  std::vector<prompt_text> texts = read_prompts(opts.prompts, opts.limit);
  const auto tokens_of = [&](const std::string& text) { return model.tokens.encode(text).size(); };
  const std::vector<prompt_text> keys = pass_key_prompts(opts.pass_keys, opts.seed, tokens_of);
  texts.insert(texts.end(), keys.begin(), keys.end());

  std::vector<tokenized_prompt> prompts;
  for (const prompt_text& text : texts) {
    auto prompt = tokenize(text, model.tokens, opts.raw, opts.question_later);
    if (!prompt) {
      std::cerr << "evaluate: skips " << text.name << ", which has one paragraph only\n";
    } else if (prompt->pruned.empty() || prompt->tokens() > longest) {
      std::cerr << "evaluate: skips " << text.name << ", which has " << prompt->tokens()
                << " tokens; 1 to " << longest << " fit\n";
    } else {
      prompts.push_back(*std::move(prompt));
    }
  }
  if (prompts.empty()) throw std::runtime_error("no prompt is left to evaluate on");
  return prompts;
}

using progress_hook = std::function<void(const std::string& phase, double fraction)>;

// Adds a prompt and what each row makes of it.
void evaluate_on(const tokenized_prompt& prompt, const std::vector<planned_row>& rows,
                 const smollm2::llama& model, const options& opts, const progress_hook& show,
                 results& all) {
  const std::size_t tokens = prompt.pruned.size();
  constexpr double prefill_part = 0.1;
  const prompt_run full(model, prompt, window_of(rows, tokens), opts.tokens, opts.full_layers,
                        [&](double done) { show("prefill", prefill_part * done); });
  std::vector<measurement> measured(rows.size());
  std::size_t done = 0;
  const auto measure = [&](std::size_t r, double share) {
    const double part = static_cast<double>(done++) / static_cast<double>(rows.size());
    show("row " + std::to_string(done) + " of " + std::to_string(rows.size()),
         prefill_part + (1 - prefill_part) * part);
    measured[r] =
        full.measure(rows[r].entry->policy({tokens, share}), opts.threads, opts.prune_every);
  };
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (!rows[r].reference) measure(r, rows[r].share);
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    if (rows[r].reference) measure(r, measured[*rows[r].reference].kept_fraction);
  }
  for (std::size_t r = 0; r < rows.size(); ++r) all.rows[r].of_prompts.push_back(measured[r]);
  all.prompts.push_back({prompt.name, tokens, full.tokens(), full.has_key(), full.recalls_key()});
}

results evaluate_all(const options& opts) {
  const smollm2::loaded_model model = smollm2::load_model(opts.model, opts.threads);
  const std::vector<tokenized_prompt> prompts = prompts_of(opts, model);
  const std::vector<planned_row> rows = plan(opts);
  results all;
  for (const planned_row& row : rows) {
    all.rows.push_back(
        {row.entry->method, row.entry->options, row.budget, row.reference, row.entry->line, {}});
  }

  smollm2::progress_bar progress;
  double all_tokens = 0, done_tokens = 0;
  for (const tokenized_prompt& prompt : prompts) {
    all_tokens += static_cast<double>(prompt.tokens());
  }
  const std::string of_prompts = " of " + std::to_string(prompts.size()) + ", ";
  for (const tokenized_prompt& prompt : prompts) {
    const std::string label = "prompt " + std::to_string(all.prompts.size() + 1) + of_prompts;
    const auto tokens = static_cast<double>(prompt.tokens());
    const auto show = [&](const std::string& phase, double fraction) {
      progress.show(label + phase, (done_tokens + fraction * tokens) / all_tokens);
    };
    evaluate_on(prompt, rows, model.network, opts, show, all);
    done_tokens += tokens;
  }
  progress.show(std::to_string(prompts.size()) + " prompts", 1);
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  return smollm2::run_program("evaluate", [&] {
    const auto opts = parse_options(argc, argv);
    if (!opts) return;
    const results all = evaluate_all(*opts);
    print(all, std::cout);
    if (!opts->csv.empty()) write_csv(all, opts->csv);
    if (!opts->json.empty()) write_json(all, opts->json);
    if (!opts->plot.empty()) draw(all, opts->plot);
  });
}
