// SPDX-License-Identifier: Apache-2.0
// One line on stderr that shows how far a program has come, where stderr is a terminal.
#pragma once

#include <string>

namespace smollm2 {

class progress_bar {
 public:
  progress_bar();
  ~progress_bar();  // ends the line
  progress_bar(const progress_bar&) = delete;
  progress_bar& operator=(const progress_bar&) = delete;

  // fraction: of all there is to do, in [0, 1].
  void show(const std::string& label, double fraction);

 private:
  bool visible_;
  bool shown_ = false;
};

}  // namespace smollm2
