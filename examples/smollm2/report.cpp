// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <algorithm>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <numeric>

#include "files.hpp"

namespace smollm2 {

namespace {

double mebibytes(std::size_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

template <class Sum, class F>
Sum sum_over(const std::vector<layer_pruning>& layers, const F& f) {
  return std::accumulate(layers.begin(), layers.end(), Sum{},
                         [&](Sum sum, const layer_pruning& layer) { return sum + f(layer); });
}

nlohmann::ordered_json json_of(const speed_test& test) {
  const auto speed = [](const measured_speed& each) -> nlohmann::ordered_json {
    return {{"tokens_per_second", each.tokens_per_second()}, {"cache_bytes", each.bytes}};
  };
  return {{"full", speed(test.full)},
          {"half_of_the_prompt", speed(test.half)},
          {"pruned", speed(test.pruned)},
          {"weight_bytes", test.weight_bytes},
          {"bandwidth_bytes_per_second", test.bandwidth},
          {"gain", test.gain()},
          {"gain_by_bytes", test.gain_by_bytes()},
          {"gain_by_fit", test.gain_by_fit()}};
}

}  // namespace

double report::kept_fraction() const {
  return sum_over<double>(layers, [](const auto& l) { return l.kept_fraction(); }) /
         static_cast<double>(layers.size());
}
bool report::pruned_before() const {
  return std::any_of(layers.begin(), layers.end(),
                     [&](const auto& l) { return l.tokens != prompt_tokens; });
}
double report::prune_seconds() const {
  return sum_over<double>(layers, [](const auto& l) { return l.seconds; });
}
std::size_t report::bytes_before() const {
  return sum_over<std::size_t>(layers, [](const auto& l) { return l.bytes_before; });
}
std::size_t report::bytes_after() const {
  return sum_over<std::size_t>(layers, [](const auto& l) { return l.bytes_after; });
}
double report::tokens_per_second() const {
  return tokens.size() < 2 ? 0 : static_cast<double>(tokens.size() - 1) / decode_seconds;
}

void print(const report& run, std::ostream& out) {
  out << std::fixed << run.text << "\n\n";
  const bool ranges = run.layers.front().counts.empty();
  const bool again = run.pruned_before();
  const std::string column = std::string(ranges ? "cut" : "stay") + " of " +
                             (again ? "slots" : std::to_string(run.prompt_tokens));
  out << "layer   " << std::left << std::setw(22) << column << std::right
      << "  kept      KiB before -> after\n";
  const bool shared = run.layers.size() == 1;
  for (std::size_t i = 0; i < run.layers.size(); ++i) {
    const layer_pruning& layer = run.layers[i];
    std::string cuts;
    const auto append = [&](int number) {
      cuts += (cuts.empty() ? "" : " ") + std::to_string(number);
    };
    for (const auto& kept : layer.kept) append(kept.cut);
    for (const auto& kept : layer.counts) append(kept.count);
    if (again && !cuts.empty()) cuts += " of " + std::to_string(layer.tokens);
    out << std::setw(5) << (shared ? "all" : std::to_string(i)) << "   " << std::left
        << std::setw(22) << (cuts.empty() ? "-" : cuts) << std::right << std::setw(6)
        << std::setprecision(1) << 100 * layer.kept_fraction() << " %   " << std::setw(8)
        << layer.bytes_before / 1024 << " -> " << layer.bytes_after / 1024 << '\n';
  }
  out << std::setprecision(1) << "\nkept " << 100 * run.kept_fraction() << " % of "
      << (again ? "what was left of " : "") << run.prompt_tokens << " tokens; cache "
      << mebibytes(run.bytes_before()) << " -> " << mebibytes(run.bytes_after()) << " MiB, "
      << mebibytes(run.bytes_before() - run.bytes_after()) << " MiB given back; peak resident set "
      << mebibytes(run.peak_resident_bytes) << " MiB\n";
  out << std::setprecision(3) << "prefill " << run.prefill_seconds << " s, prune "
      << run.prune_seconds() << " s, decode " << run.decode_seconds << " s ("
      << std::setprecision(1) << run.tokens_per_second() << " tokens/s)\n";
  if (run.cache_bytes_at_end) {
    out << "pruned while decoding: cache at most " << mebibytes(run.largest_cache_bytes) << ", "
        << mebibytes(*run.cache_bytes_at_end) << " MiB at the end\n";
  }
  if (run.against_full) {
    out << std::setprecision(4) << "against the full cache: mean KL " << run.against_full->mean_kl
        << " nats, same top token " << std::setprecision(1)
        << 100 * run.against_full->same_top_token << " %, full cache decodes "
        << run.against_full->full_tokens_per_second << " tokens/s\n";
  }
  if (run.speed) print(*run.speed, out);
}

namespace {

nlohmann::ordered_json json_of(const report& run) {
  nlohmann::ordered_json json{{"prompt_tokens", run.prompt_tokens},
                              {"kept_fraction", run.kept_fraction()},
                              {"cache_bytes_before", run.bytes_before()},
                              {"cache_bytes_after", run.bytes_after()},
                              {"peak_resident_bytes", run.peak_resident_bytes},
                              {"prefill_seconds", run.prefill_seconds},
                              {"prune_seconds", run.prune_seconds()},
                              {"decode_seconds", run.decode_seconds},
                              {"tokens_per_second", run.tokens_per_second()},
                              {"tokens", run.tokens},
                              {"text", run.text}};
  for (const layer_pruning& layer : run.layers) {
    nlohmann::ordered_json kept = nlohmann::json::array();
    for (const auto& range : layer.kept) {
      kept.push_back({{"sinks", range.sinks},
                      {"cut", range.cut},
                      {"tokens", range.tokens},
                      {"loss", range.loss},
                      {"dropped_mass", range.dropped_mass}});
    }
    for (const auto& some : layer.counts) {
      kept.push_back({{"count", some.count}, {"tokens", some.tokens}});
    }
    json["layers"].push_back({{"kept", kept},
                              {"kept_fraction", layer.kept_fraction()},
                              {"bytes_before", layer.bytes_before},
                              {"bytes_after", layer.bytes_after},
                              {"prune_seconds", layer.seconds}});
  }
  if (run.cache_bytes_at_end) {
    json["while_decoding"] = {{"largest_cache_bytes", run.largest_cache_bytes},
                              {"cache_bytes_at_end", *run.cache_bytes_at_end}};
  }
  if (run.against_full) {
    json["against_full"] = {{"mean_kl_nats", run.against_full->mean_kl},
                            {"same_top_token", run.against_full->same_top_token},
                            {"full_tokens_per_second", run.against_full->full_tokens_per_second}};
  }
  if (run.speed) json["speed"] = json_of(*run.speed);
  return json;
}

void write(const nlohmann::ordered_json& json, const std::filesystem::path& path) {
  // A token may end inside a character: what is not UTF-8 is replaced.
  write_file(path, json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + '\n');
}

}  // namespace

void write_json(const report& run, const std::filesystem::path& path) { write(json_of(run), path); }

void write_json(const std::vector<report>& turns, const std::filesystem::path& path) {
  nlohmann::ordered_json json;
  for (const report& turn : turns) json["turns"].push_back(json_of(turn));
  write(json, path);
}

}  // namespace smollm2
