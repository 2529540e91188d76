// SPDX-License-Identifier: Apache-2.0
#include "tables.hpp"

#include <algorithm>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <sstream>

#include "files.hpp"

namespace evaluate {

namespace {

// Of names that this program and files make: at worst they hold quotes.
std::string csv_field(const std::string& text) {
  std::string field = "\"";
  for (const char c : text) field += c == '"' ? "\"\"" : std::string(1, c);
  return field + '"';
}

nlohmann::ordered_json to_json(const measurement& m) {
  return {{"kept_fraction", m.kept_fraction},
          {"mean_kl_nats", m.against_full.mean_kl},
          {"largest_kl_nats", m.against_full.largest_kl},
          {"same_top_token", m.against_full.same_top_token},
          {"keys", m.keys},
          {"select_milliseconds", 1000 * m.select_seconds},
          {"cache_bytes", m.cache_bytes}};
}

bool has_keys(const results& all) {
  return std::any_of(all.prompts.begin(), all.prompts.end(),
                     [](const evaluated_prompt& prompt) { return prompt.has_key; });
}

bool has_references(const results& all) {
  return std::any_of(all.rows.begin(), all.rows.end(),
                     [](const result_row& row) { return row.reference.has_value(); });
}

// What was evaluated on, and what columns mean that are not there always.
void print_introduction(const results& all, std::ostream& out) {
  std::size_t shortest = all.prompts.front().tokens, longest = 0;
  std::size_t compared = 0, keys = 0, recalled = 0;
  for (const evaluated_prompt& prompt : all.prompts) {
    shortest = std::min(shortest, prompt.tokens);
    longest = std::max(longest, prompt.tokens);
    compared += prompt.compared_tokens;
    keys += prompt.has_key ? 1 : 0;
    recalled += prompt.recalls_key ? 1 : 0;
  }
  out << all.prompts.size() << (all.prompts.size() == 1 ? " prompt of " : " prompts of ")
      << shortest;
  if (shortest != longest) out << " to " << longest;
  out << " tokens; KL in nats against the full cache over " << compared
      << " tokens of the answers\n";
  if (has_references(all)) {
    out << "farther: prompts with a larger KL than that of the row whose size it has\n";
  }
  if (has_keys(all)) {
    out << "keys: recalled, of " << recalled << " that the full cache recalls (" << keys
        << " were asked for)\n";
  }
  out << '\n';
}

}  // namespace

void print(const results& all, std::ostream& out) {
  print_introduction(all, out);
  const bool farther = has_references(all), keys = has_keys(all);
  const std::string options = "options or budget";
  std::size_t widest = options.size();
  for (const result_row& row : all.rows) widest = std::max(widest, row.label().size());
  const auto width = static_cast<int>(widest);
  out << std::left << std::setw(18) << "method" << std::setw(width) << options << std::right
      << "    kept        KL    median  largest  same top" << (farther ? "  farther" : "")
      << (keys ? "  keys" : "") << "  select ms  cache MiB\n"
      << std::fixed;
  for (const result_row& row : all.rows) {
    const measurement mean = all.mean(row);
    out << std::left << std::setw(18) << row.method << std::setw(width) << row.label() << std::right
        << std::setprecision(1) << std::setw(6) << 100 * mean.kept_fraction << " %"
        << std::setprecision(5) << std::setw(10) << mean.against_full.mean_kl << std::setw(10)
        << all.median_kl(row) << std::setprecision(3) << std::setw(9)
        << mean.against_full.largest_kl << std::setprecision(1) << std::setw(8)
        << 100 * mean.against_full.same_top_token << " %";
    if (farther) out << std::setw(9) << (row.reference ? std::to_string(all.farther(row)) : "");
    if (keys) out << std::setw(6) << mean.keys;
    out << std::setw(11) << 1000 * mean.select_seconds << std::setw(11)
        << mean.cache_bytes / (1 << 20) << '\n';
  }
}

void write_csv(const results& all, const std::filesystem::path& path) {
  std::ostringstream csv;
  csv << "prompt,prompt_tokens,compared_tokens,method,options,budget,kept_fraction,mean_kl_nats,"
         "largest_kl_nats,same_top_token,keys,select_milliseconds,cache_bytes\n"
      << std::setprecision(7);
  const auto write = [&](const std::string& prompt, const result_row& row, const measurement& m) {
    csv << prompt << ',' << csv_field(row.method) << ',' << csv_field(row.options) << ','
        << csv_field(row.budget);
    for (const double value :
         {m.kept_fraction, m.against_full.mean_kl, m.against_full.largest_kl,
          m.against_full.same_top_token, static_cast<double>(m.keys), 1000 * m.select_seconds}) {
      csv << ',' << value;
    }
    csv << ',' << static_cast<std::size_t>(m.cache_bytes) << '\n';
  };
  for (const result_row& row : all.rows) write("\"mean\",,", row, all.mean(row));
  for (std::size_t i = 0; i < all.prompts.size(); ++i) {
    const evaluated_prompt& prompt = all.prompts[i];
    const std::string start = csv_field(prompt.name) + ',' + std::to_string(prompt.tokens) + ',' +
                              std::to_string(prompt.compared_tokens);
    for (const result_row& row : all.rows) write(start, row, row.of_prompts[i]);
  }
  smollm2::write_file(path, csv.str());
}

void write_json(const results& all, const std::filesystem::path& path) {
  nlohmann::ordered_json json;
  for (const evaluated_prompt& prompt : all.prompts) {
    json["prompts"].push_back({{"name", prompt.name},
                               {"tokens", prompt.tokens},
                               {"compared_tokens", prompt.compared_tokens},
                               {"has_key", prompt.has_key},
                               {"recalls_key", prompt.recalls_key}});
  }
  for (const result_row& row : all.rows) {
    nlohmann::ordered_json entry{{"method", row.method},
                                 {"options", row.options},
                                 {"budget", row.budget},
                                 {"mean", to_json(all.mean(row))},
                                 {"median_kl_nats", all.median_kl(row)}};
    if (row.reference) entry["farther"] = all.farther(row);
    for (const measurement& each : row.of_prompts) entry["of_prompts"].push_back(to_json(each));
    json["rows"].push_back(entry);
  }
  smollm2::write_file(path,
                      json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + '\n');
}

}  // namespace evaluate
