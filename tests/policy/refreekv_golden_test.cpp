// SPDX-License-Identifier: Apache-2.0
// Cuts must equal the golden cuts, line by line. The released code and a float64 oracle agree on
// them.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "layouts.hpp"
#include "selection.hpp"

namespace {

using csv_line = std::map<std::string, std::string>;

std::filesystem::path golden_folder() {
  const char* folder = std::getenv("REFREEKV_GOLDEN");
  return folder != nullptr ? folder : REFREEKV_GOLDEN_DIR;
}

/// Returns the lines of every CSV file in the golden folder whose header has `column`.
std::vector<csv_line> golden_lines(const std::string& column) {
  std::vector<csv_line> lines;
  for (const auto& entry : std::filesystem::directory_iterator(golden_folder())) {
    if (entry.path().extension() != ".csv") continue;
    std::ifstream file(entry.path());
    const auto split = [](const std::string& text) {
      std::vector<std::string> fields;
      std::istringstream in(text);
      for (std::string field; std::getline(in, field, ',');) fields.push_back(field);
      return fields;
    };
    std::string text;
    std::getline(file, text);
    const std::vector<std::string> header = split(text);
    if (std::find(header.begin(), header.end(), column) == header.end()) continue;
    for (index_t number = 2; std::getline(file, text); ++number) {
      const std::vector<std::string> fields = split(text);
      REQUIRE(fields.size() == header.size());
      csv_line line{{"where", entry.path().filename().string() + ":" + std::to_string(number)}};
      for (std::size_t i = 0; i < fields.size(); ++i) line[header[i]] = fields[i];
      lines.push_back(line);
    }
  }
  return lines;
}

index_t integer(const csv_line& line, const std::string& column) {
  return std::stoll(line.at(column));
}

std::uint32_t mix(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ (x >> 16);
}

/// Returns attention rows [head, token]: integer weights divided by their sum.
std::vector<float> attention_rows(const csv_line& line) {
  const std::string& kind = line.at("kind");
  const auto seed = static_cast<std::uint32_t>(integer(line, "seed"));
  const auto heads = static_cast<std::uint32_t>(integer(line, "heads"));
  const auto n = static_cast<std::uint32_t>(integer(line, "tokens"));
  std::vector<float> rows;
  for (std::uint32_t h = 0; h < heads; ++h) {
    std::vector<std::uint32_t> weights;
    double sum = 0;
    for (std::uint32_t j = 0; j < n; ++j) {
      const std::uint32_t z = mix(seed * 0x9E3779B1u + h * 65536u + j);
      std::uint32_t w = 1 + z % 8;
      if (kind == "sink") w += j < 4 ? 16 * n / (j + 1) : 0;
      if (kind == "recent") w += j >= n - n / 8 ? 512 : 0;
      if (kind == "needle") w += z % 97 == 0 ? 4096 : 0;
      if (kind == "heavy") w = 1u << (z % 16);
      if (kind == "early") w += j < n / 4 ? 64 : 0;
      weights.push_back(w);
      sum += w;
    }
    for (const std::uint32_t w : weights) rows.push_back(static_cast<float>(w / sum));
  }
  return rows;
}

/// Returns the last query in steps of 1/2 and keys in steps of 1/4: exact in every element type.
problem query_and_keys(const csv_line& line) {
  const auto seed = static_cast<std::uint32_t>(integer(line, "seed"));
  const index_t kv_heads = integer(line, "kv_heads"), q_heads = integer(line, "q_heads");
  problem p(kv_heads, q_heads / kv_heads, integer(line, "head_dim"), 1,
            {static_cast<position_t>(integer(line, "tokens"))});
  for (index_t h = 0; h < q_heads; ++h) {
    for (index_t d = 0; d < p.head_dim; ++d) {
      const auto i = static_cast<std::uint32_t>(h * 256 + d + (1 << 24));
      p.query(0, 0, h, d) = (static_cast<float>(mix(seed * 0x85EBCA77u + i) % 9) - 4) / 2;
    }
  }
  for (index_t h = 0; h < kv_heads; ++h) {
    for (index_t t = 0; t < p.lengths[0]; ++t) {
      for (index_t d = 0; d < p.head_dim; ++d) {
        const auto i = static_cast<std::uint32_t>((h << 20) + t * 256 + d);
        p.keys.at(0, h, t, d) = (static_cast<float>(mix(seed * 0xC2B2AE3Du + i) % 17) - 8) / 4;
      }
    }
  }
  return p;
}

/// Returns the cuts. Requires that they do not depend on how the work is divided.
template <class Layer>
std::vector<position_t> cuts(const refreekv::policy::refreekv& policy, const Layer& layer) {
  const auto of = [](const selection& s) {
    REQUIRE(s.status == refreekv::status::ok);
    std::vector<position_t> c;
    for (const auto& kept : s.kept) c.push_back(kept.cut);
    return c;
  };
  const std::vector<position_t> one = of(run_select(policy, divided<1>(), layer));
  if (exhaustive) REQUIRE(of(run_select(policy, divided<2>(), layer)) == one);
  REQUIRE(of(run_select(policy, divided<7>(), layer)) == one);
  return one;
}

refreekv::policy::refreekv rule_of(const csv_line& line) {
  return {.threshold = std::stod(line.at("threshold")), .full_layers = 0};
}

/// Checks the cuts in every layout if exhaustive, otherwise in the layout of this turn.
template <class T>
void check_query_and_keys(const csv_line& line, std::size_t turn, const problem& p) {
  std::vector<position_t> per_head;
  std::istringstream in(line.at("cuts_per_kv_head"));
  for (position_t cut; in >> cut;) per_head.push_back(cut);
  std::vector<T> queries;
  for (const float q : p.queries) queries.push_back(to_element<T>(q));
  const refreekv::view q(queries.data(), {1, 1, p.q_heads(), p.head_dim});

  const auto check = [&](const char* layout, const auto& cache) {
    INFO(layout);
    const auto layer = refreekv::observe(q, cache.source());
    refreekv::policy::refreekv policy = rule_of(line);
    CHECK(cuts(policy, layer) == std::vector{static_cast<position_t>(integer(line, "cut"))});
    policy.scope = refreekv::cut_scope::kv_head;
    CHECK(cuts(policy, layer) == per_head);
  };
  if (exhaustive) {
    for_each_layout<T>(p.keys, check);
  } else {
    with_layout<T>(turn % layout_kinds, p.keys, check);
  }
}

}  // namespace

TEST_CASE("attention rows give the golden cuts", "[golden]") {
  const std::vector<csv_line> lines = golden_lines("cut_full_row");
  for (const csv_line& line : lines) {
    INFO(line.at("where"));
    const std::vector<float> rows = attention_rows(line);
    const refreekv::view a(rows.data(), {1, 1, integer(line, "heads"), integer(line, "tokens")});
    const auto layer = refreekv::observe_rows(a, 1);
    refreekv::policy::refreekv policy = rule_of(line);
    CHECK(cuts(policy, layer) == std::vector{static_cast<position_t>(integer(line, "cut"))});
    CHECK(run_select(policy, divided<1>(), layer).at(0).loss ==
          Approx(std::stod(line.at("loss_at_cut"))).margin(1e-6));
    policy.norm = refreekv::norm_scope::full_row;
    CHECK(cuts(policy, layer) ==
          std::vector{static_cast<position_t>(integer(line, "cut_full_row"))});
  }
  WARN(lines.size() << " lines of attention rows in " << golden_folder());
}

TEST_CASE("queries and keys give the golden cuts in every type and layout", "[golden]") {
  const std::vector<csv_line> lines = golden_lines("cuts_per_kv_head");
  for (const csv_line& line : lines) {
    INFO(line.at("where"));
    const problem p = query_and_keys(line);
    const auto turn = static_cast<std::size_t>(&line - lines.data());
    check_query_and_keys<float>(line, turn, p);
    check_query_and_keys<Eigen::half>(line, turn + 1, p);
    check_query_and_keys<Eigen::bfloat16>(line, turn + 2, p);
  }
  WARN(lines.size() << " lines of queries and keys in " << golden_folder());
}

TEST_CASE("there are golden lines", "[golden]") { CHECK(golden_lines("cut").size() > 0); }
