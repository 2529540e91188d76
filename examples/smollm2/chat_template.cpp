// SPDX-License-Identifier: Apache-2.0
// Recognises the one template that differs between models only in its default system message.
#include "chat_template.hpp"

#include <stdexcept>

namespace smollm2 {
namespace {

constexpr std::string_view before_system =
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n";

constexpr std::string_view after_system =
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

}  // namespace

chat_frame parse_chat_template(std::string_view chat_template) {
  const bool known = chat_template.size() >= before_system.size() + after_system.size() &&
                     chat_template.starts_with(before_system) &&
                     chat_template.ends_with(after_system);
  std::string_view system = chat_template;
  if (known) {
    system.remove_prefix(before_system.size());
    system.remove_suffix(after_system.size());
  }
  // A quote or a backslash would end or escape the Jinja string that the message is written in.
  if (!known || system.find_first_of("'\\") != std::string_view::npos) {
    throw std::runtime_error("the model's chat template is not the ChatML form of SmolLM2");
  }
  return {.opening = "<|im_start|>system\n" + std::string(system) + "<|im_end|>\n<|im_start|>",
          .role = "user\n",
          .closing = "<|im_end|>\n<|im_start|>assistant\n",
          .reopening = "<|im_end|>\n<|im_start|>"};
}

}  // namespace smollm2
