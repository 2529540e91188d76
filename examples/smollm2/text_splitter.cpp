// SPDX-License-Identifier: Apache-2.0
// The splitting rule as one PCRE2 pattern.
#include "text_splitter.hpp"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>

namespace smollm2 {
namespace {

// GPT-2's pattern on what lies between digits. Splitting digits off first means that white space
// before a digit ends a stretch of text just as the end of the text does: hence [^\s\p{N}] where
// GPT-2 has \S.
constexpr std::string_view pattern =
    R"(\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+)";

struct free_match_data {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

PCRE2_SPTR units_of(std::string_view text) { return reinterpret_cast<PCRE2_SPTR>(text.data()); }

// The length of the longest prefix of `text` that is valid UTF-8.
std::size_t valid_prefix(const pcre2_code* code, std::string_view text, pcre2_match_data* match) {
  const int result =
      pcre2_match(code, units_of(text), text.size(), 0, PCRE2_ANCHORED, match, nullptr);
  const bool invalid = PCRE2_ERROR_UTF8_ERR21 <= result && result <= PCRE2_ERROR_UTF8_ERR1;
  return invalid ? pcre2_get_startchar(match) : text.size();
}

// Checking UTF-8 anew for every piece would take quadratic time, so `text` must be known valid.
void split_valid(const pcre2_code* code, std::string_view text, pcre2_match_data* match,
                 std::vector<std::string_view>& pieces) {
  for (std::size_t begin = 0; begin < text.size();) {
    const int result = pcre2_match(code, units_of(text), text.size(), begin,
                                   PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK, match, nullptr);
    if (result < 0) {
      throw std::runtime_error("cannot split the text: PCRE2 error " + std::to_string(result));
    }
    const std::size_t end = pcre2_get_ovector_pointer(match)[1];
    pieces.push_back(text.substr(begin, end - begin));
    begin = end;
  }
}

}  // namespace

void text_splitter::free_code::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

text_splitter::text_splitter() {
  int error = 0;
  PCRE2_SIZE error_offset = 0;
  code_.reset(pcre2_compile(units_of(pattern), pattern.size(), PCRE2_UTF | PCRE2_UCP, &error,
                            &error_offset, nullptr));
  if (code_ == nullptr) throw std::runtime_error("this build of PCRE2 lacks Unicode support");
}

std::vector<std::string_view> text_splitter::split(std::string_view text) const {
  const std::unique_ptr<pcre2_match_data, free_match_data> match(
      pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  if (match == nullptr) throw std::bad_alloc();
  std::vector<std::string_view> pieces;
  while (!text.empty()) {
    const std::size_t valid = valid_prefix(code_.get(), text, match.get());
    split_valid(code_.get(), text.substr(0, valid), match.get(), pieces);
    text.remove_prefix(valid);
    if (text.empty()) break;
    pieces.push_back(text.substr(0, 1));
    text.remove_prefix(1);
  }
  return pieces;
}

}  // namespace smollm2
