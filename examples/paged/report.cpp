// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <algorithm>
#include <iomanip>
#include <sstream>
#include <string>

namespace paged {
namespace {

std::string mebibytes(std::size_t bytes) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << static_cast<double>(bytes) / (1 << 20) << " MiB";
  return text.str();
}

void print_layers(const serving_result& run, std::ostream& out) {
  out << "layer   kept of " << std::left << std::setw(8) << run.a.prompt_tokens << std::right
      << "pages before -> after      KiB before -> after   returned\n";
  const std::size_t page = run.page.bytes();
  for (std::size_t layer = 0; layer < run.releases.size(); ++layer) {
    const page_release& each = run.releases[layer];
    out << std::setw(5) << layer << std::setw(16) << each.kept << std::setw(16) << each.pages_before
        << " -> " << std::left << std::setw(5) << each.pages_after << std::right << std::setw(15)
        << each.pages_before * page / 1024 << " -> " << std::left << std::setw(5)
        << each.pages_after * page / 1024 << std::right << std::setw(11)
        << each.returned.size() * page / 1024 << '\n';
  }
}

void print_kept(const std::vector<page_release>& releases, std::ostream& out) {
  const double stand_ins = share_of(&page_release::stand_ins, releases);
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << "kept "
       << 100 * share_of(&page_release::kept, releases) << " % of A's " << releases.front().tokens
       << " tokens";
  if (stand_ins > 0) text << ", " << 100 * stand_ins << " % as stand-ins";
  out << text.str() << '\n';
}

std::string on_one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

void print_sequence(const char* name, const served& run, const smollm2::tokenizer& tokens,
                    std::ostream& out) {
  out << name << ": " << run.prompt_tokens << " + " << run.tokens.size() << " tokens in "
      << run.pages << " pages; logits within " << run.difference
      << " of those in a pool of its own\n   "
      << std::quoted(on_one_line(tokens.decode(run.tokens))) << '\n';
}

}  // namespace

void print(const serving_result& run, const smollm2::tokenizer& tokens, std::ostream& out) {
  const std::size_t page = run.page.bytes();
  const auto event = [&](const std::string& text, std::size_t free) {
    out << std::left << std::setw(66) << text << std::right << std::setw(6) << free << '\n';
  };
  const auto count = [](std::size_t n) { return std::to_string(n); };
  print_layers(run, out);
  out << '\n';
  event("a pool of " + count(run.pool_pages) + " pages of " + count(run.page.tokens) +
            " tokens of one layer, " + mebibytes(run.pool_pages * page) + "; free:",
        run.pool_pages);
  event("A and B admitted; " + count(run.shared_tokens) + " tokens, " + count(run.shared_pages) +
            " pages belong to both",
        run.free_before);
  event("C needs " + count(run.needed_by_c) + " pages and is refused", run.free_before);
  event("A prefilled and pruned layer by layer", run.free_after);
  event("C admitted, " + count(run.returned_to_c) + " of its pages are A's", run.free_at_end);
  out << '\n';
  print_kept(run.releases, out);
  out << "promised " << run.promised() << " bytes, " << run.returned() << " came back ("
      << mebibytes(run.returned())
      << ")\nshared pages: " << (run.shared_pages_unchanged ? "no byte was written" : "WRITTEN")
      << '\n';
  out << std::setprecision(3);
  print_sequence("A", run.a, tokens, out);
  print_sequence("B", run.b, tokens, out);
  print_sequence("C", run.c, tokens, out);
}

void print(const decoding_speed& run, std::ostream& out) {
  print_kept(run.releases, out);
  print(run.test, out);
}

}  // namespace paged
