// SPDX-License-Identifier: Apache-2.0
// Splits text into the pieces within which byte pairs may merge: GPT-2's rule, every digit alone.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;

namespace smollm2 {

class text_splitter {
 public:
  text_splitter();

  // The pieces join to exactly `text`. A byte that is not part of valid UTF-8 is its own piece.
  std::vector<std::string_view> split(std::string_view text) const;

 private:
  struct free_code {
    void operator()(pcre2_real_code_8* code) const;
  };

  std::unique_ptr<pcre2_real_code_8, free_code> code_;
};

}  // namespace smollm2
