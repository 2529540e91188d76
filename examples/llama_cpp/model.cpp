// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <mutex>
#include <stdexcept>

#include "log.hpp"

namespace llama_cpp {

namespace {

// llama.cpp fills a buffer and returns the length it takes, negated where it is too small by some.
template <class Container, class Fill>
Container filled(const Fill& fill) {
  Container buffer;
  const std::int32_t length = std::abs(fill(buffer.data(), 0));
  buffer.resize(static_cast<std::size_t>(length));
  fill(buffer.data(), length);
  return buffer;
}

}  // namespace

model::model(const std::filesystem::path& path) {
  static std::once_flag once;
  std::call_once(once, [] {
    silence_log();
    llama_backend_init();
  });
  if (!std::filesystem::exists(path)) throw std::runtime_error(path.string() + ": no such file");
  model_.reset(llama_model_load_from_file(path.c_str(), llama_model_default_params()));
  if (model_ == nullptr) fail(path.string() + ": llama.cpp cannot load it");
  if (llama_model_is_recurrent(get()) || llama_model_is_hybrid(get())) {
    throw std::runtime_error(path.string() + ": recurrent layers have no tokens to drop");
  }
  if (llama_model_n_swa(get()) > 0) {
    throw std::runtime_error(path.string() + ": layers with a sliding window have their own cells");
  }
}

std::size_t model::longest_context() const {
  return static_cast<std::size_t>(llama_model_n_ctx_train(get()));
}

std::size_t model::vocabulary_size() const {
  return static_cast<std::size_t>(llama_vocab_n_tokens(vocabulary()));
}

llama_token model::end_token() const { return llama_vocab_eos(vocabulary()); }

std::vector<llama_token> model::encode_chat(const std::string& prompt) const {
  const char* form = llama_model_chat_template(get(), nullptr);
  if (form == nullptr) throw std::runtime_error("the model has no chat template");
  const llama_chat_message message{"user", prompt.c_str()};
  const auto text = filled<std::string>([&](char* to, std::int32_t room) {
    const std::int32_t length = llama_chat_apply_template(form, &message, 1, true, to, room);
    if (length < 0) throw std::runtime_error("llama.cpp does not know the model's chat template");
    return length;
  });
  return filled<std::vector<llama_token>>([&](llama_token* to, std::int32_t room) {
    return llama_tokenize(vocabulary(), text.data(), static_cast<std::int32_t>(text.size()), to,
                          room, true, true);
  });
}

std::string model::decode(std::span<const llama_token> tokens) const {
  return filled<std::string>([&](char* to, std::int32_t room) {
    return llama_detokenize(vocabulary(), tokens.data(), static_cast<std::int32_t>(tokens.size()),
                            to, room, false, false);
  });
}

}  // namespace llama_cpp
