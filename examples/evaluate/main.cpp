// SPDX-License-Identifier: Apache-2.0
// Compares refreekv's methods on a real model: what each keeps, and how its predictions change.
#include <algorithm>
#include <functional>
#include <iostream>

#include "catalogue.hpp"
#include "command_line.hpp"
#include "loaded_model.hpp"
#include "options.hpp"
#include "picture.hpp"
#include "progress_bar.hpp"
#include "prompt_files.hpp"
#include "tables.hpp"

namespace {

using namespace evaluate;

struct tokenized_prompt {
  std::string name;
  std::vector<int> tokens;
};

// Prompts that are too long are left out, with a word on stderr.
std::vector<tokenized_prompt> tokenize(const options& opts, const smollm2::loaded_model& model) {
  const std::size_t context = model.network.config().context;
  if (opts.tokens >= context) {
    throw std::runtime_error("--tokens: the model's context is " + std::to_string(context));
  }
  const std::size_t longest = std::min(opts.max_tokens.value_or(context), context - opts.tokens);
  std::vector<tokenized_prompt> prompts;
  for (const prompt_text& prompt : read_prompts(opts.prompts, opts.limit)) {
    std::vector<int> tokens =
        opts.raw ? model.tokens.encode(prompt.text) : model.tokens.encode_chat(prompt.text);
    if (tokens.empty() || tokens.size() > longest) {
      std::cerr << "evaluate: skips " << prompt.name << ", which has " << tokens.size()
                << " tokens; 1 to " << longest << " fit\n";
    } else {
      prompts.push_back({prompt.name, std::move(tokens)});
    }
  }
  if (prompts.empty()) throw std::runtime_error("no prompt is left to evaluate on");
  return prompts;
}

// A row of the table before it has results.
struct planned_row {
  const variant* what;
  std::optional<named_budget> budget;  // nothing for methods that have none
};

std::vector<planned_row> plan(const options& opts) {
  std::vector<planned_row> rows;
  for (const variant& each : all_variants()) {
    if (std::find(opts.methods.begin(), opts.methods.end(), each.method) == opts.methods.end()) {
      continue;
    }
    if (!each.has_budget) rows.push_back({&each, std::nullopt});
    for (std::size_t i = 0; each.has_budget && i < opts.budgets.size(); ++i) {
      rows.push_back({&each, opts.budgets[i]});
    }
  }
  return rows;
}

// The most queries that any row looks at.
std::size_t window_of(const std::vector<planned_row>& rows, const circumstances& facts) {
  std::size_t window = 1;
  for (const planned_row& row : rows) {
    window = std::max(window, smollm2::window_of(row.what->rule(facts)));
  }
  return window;
}

using progress_hook = std::function<void(const std::string& what, double fraction)>;

// Adds a prompt and what each row makes of it.
void evaluate_on(const tokenized_prompt& prompt, const std::vector<planned_row>& rows,
                 const smollm2::llama& model, const options& opts, const progress_hook& show,
                 results& all) {
  circumstances facts{prompt.tokens.size(), 1};
  constexpr double prefill_part = 0.1;
  const prompt_run full(model, prompt.tokens, window_of(rows, facts), opts.tokens, opts.full_layers,
                        [&](double done) { show("prefill", prefill_part * done); });
  const double default_share = full.kept_fraction(refreekv::policy::refreekv{}, opts.threads);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const double done = static_cast<double>(r) / static_cast<double>(rows.size());
    show("row " + std::to_string(r + 1) + " of " + std::to_string(rows.size()),
         prefill_part + (1 - prefill_part) * done);
    if (rows[r].budget) facts.share = rows[r].budget->share.value_or(default_share);
    all.rows[r].of_prompts.push_back(full.measure(rows[r].what->rule(facts), opts.threads));
  }
  all.prompts.push_back({prompt.name, prompt.tokens.size(), full.tokens()});
}

results evaluate_all(const options& opts) {
  const smollm2::loaded_model model = smollm2::load_model(opts.model, opts.threads);
  const std::vector<tokenized_prompt> prompts = tokenize(opts, model);
  const std::vector<planned_row> rows = plan(opts);
  results all;
  for (const planned_row& row : rows) {
    const std::string budget = row.budget ? row.budget->name : "";
    all.rows.push_back({row.what->method, row.what->options, budget, row.what->line, {}});
  }

  smollm2::progress_bar progress;
  double all_tokens = 0, done_tokens = 0;
  for (const tokenized_prompt& prompt : prompts) {
    all_tokens += static_cast<double>(prompt.tokens.size());
  }
  const std::string of_prompts = " of " + std::to_string(prompts.size()) + ", ";
  for (const tokenized_prompt& prompt : prompts) {
    const std::string which = "prompt " + std::to_string(all.prompts.size() + 1) + of_prompts;
    const auto tokens = static_cast<double>(prompt.tokens.size());
    const auto show = [&](const std::string& what, double fraction) {
      progress.show(which + what, (done_tokens + fraction * tokens) / all_tokens);
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
