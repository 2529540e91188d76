// SPDX-License-Identifier: Apache-2.0
// The frame that a model's chat template puts around a user's message.
#pragma once

#include <string>
#include <string_view>

namespace smollm2 {

// A conversation of user messages, each up to where the model's answer begins.
struct chat_frame {
  std::string opening;    // the default system message, and the marker that opens a message
  std::string role;       // plain text between that marker and the user's text
  std::string closing;    // what ends the user's message and opens the answer
  std::string reopening;  // what ends the answer and opens the next message
};

// Reads the ChatML template that this family of models carries, default system message included;
// throws std::runtime_error on any other template, since there is no Jinja engine here.
chat_frame parse_chat_template(std::string_view chat_template);

}  // namespace smollm2
