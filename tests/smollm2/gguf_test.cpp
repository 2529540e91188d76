// SPDX-License-Identifier: Apache-2.0
// GGUF files are read as written, and damaged ones are refused.
#include "gguf.hpp"

#include <cstdint>
#include <string>
#include <vector>

#include "catch.hpp"
#include "dequantize.hpp"
#include "gguf_writer.hpp"

using namespace smollm2;
using namespace smollm2_test;

namespace {

gguf_writer small_file() {
  gguf_writer file;
  file.add("answer", std::uint32_t{42}).add("ratio", 0.25f).add("yes", true).add("name", "small");
  file.add("integers", std::vector<std::int32_t>{-1, 2}).add("reals", std::vector<float>{0.5f});
  file.add("texts", std::vector<std::string>{"", "b"});
  file.add_tensor("vector", {3}, std::vector<float>{1, 2, 3});
  file.add_tensor("matrix", {2, 32}, 8, std::string(2 * 34, '\1'));
  return file;
}

// Opens the file and reads all that it holds.
void read_everything(const temporary_file& file) {
  const gguf_file read(file.path());
  for (const gguf_tensor& tensor : read.tensors()) {
    std::vector<float> values(tensor.elements());
    dequantize(tensor, values);
  }
}

void check_message(const std::string& bytes, const std::string& message) {
  const temporary_file file(bytes);
  CHECK_THROWS_WITH(gguf_file(file.path()), file.path().string() + message);
}

}  // namespace

TEST_CASE("metadata and tensors are read as written") {
  const std::uint32_t version = GENERATE(2u, 3u);
  const temporary_file file(small_file().bytes(version));
  const gguf_file read(file.path());
  CHECK(read.get<std::int64_t>("answer") == 42);
  CHECK(read.get<double>("ratio") == 0.25);
  CHECK(read.get<bool>("yes"));
  CHECK(read.get<std::string_view>("name") == "small");
  CHECK(read.get<std::vector<std::int64_t>>("integers") == std::vector<std::int64_t>{-1, 2});
  CHECK(read.get<std::vector<double>>("reals") == std::vector<double>{0.5});
  CHECK(read.get<std::vector<std::string_view>>("texts") == std::vector<std::string_view>{"", "b"});
  CHECK(read.has("yes"));
  CHECK_FALSE(read.has("no"));
  CHECK(read.tensors().size() == 2);

  const gguf_tensor& tensor = read.tensor("vector");
  CHECK(tensor.shape == std::vector<std::size_t>{3});
  std::vector<float> values(3);
  dequantize(tensor, values);
  CHECK(values == std::vector<float>{1, 2, 3});
  CHECK(read.tensor("matrix").shape == std::vector<std::size_t>{2, 32});
  CHECK(read.tensor("matrix").data.size() == 2 * 34);
}

TEST_CASE("what is missing or of another type is named") {
  const temporary_file file(small_file().bytes());
  const gguf_file read(file.path());
  const std::string path = file.path().string();
  CHECK_THROWS_WITH(read.get<bool>("no"), path + " has no metadata 'no'");
  CHECK_THROWS_WITH(read.get<bool>("name"), path + " holds metadata 'name' of an unexpected type");
  CHECK_THROWS_WITH(read.tensor("no"), path + " has no tensor 'no'");
}

TEST_CASE("what is no GGUF file is refused") {
  CHECK_THROWS_WITH(gguf_file("/nowhere/model.gguf"), "no such file: /nowhere/model.gguf");
  CHECK_THROWS_WITH(gguf_file("/"), "cannot read /");
  check_message("", " is not a GGUF file");
  check_message("GGML....", " is not a GGUF file");
  check_message(small_file().bytes(1),
                " is of GGUF version 1; this example reads versions 2 and 3");
}

TEST_CASE("a file cut short at any byte is refused") {
  const std::string intact = small_file().bytes();
  read_everything(temporary_file(intact));
  for (std::size_t size = 0; size < intact.size(); ++size) {
    CAPTURE(size);
    const temporary_file file(intact.substr(0, size));
    CHECK_THROWS_AS(read_everything(file), std::runtime_error);
  }
}

TEST_CASE("a file with any byte changed is read or refused, and does no harm") {
  const std::string intact = small_file().bytes();
  const auto change = static_cast<char>(GENERATE(0x01, 0x7f, 0x80, 0xff));
  for (std::size_t i = 0; i < intact.size(); ++i) {
    CAPTURE(i);
    std::string damaged = intact;
    damaged[i] = static_cast<char>(damaged[i] ^ change);
    const temporary_file file(damaged);
    try {
      read_everything(file);
    } catch (const std::runtime_error&) {
    }
  }
}

TEST_CASE("impossible counts, shapes and offsets are refused") {
  byte_stream huge_counts;
  huge_counts.raw("GGUF")
      .number(std::uint32_t{3})
      .number(~std::uint64_t{0})
      .number(~std::uint64_t{0});
  check_message(huge_counts.bytes(), " is a truncated GGUF file");

  byte_stream huge_array;
  huge_array.raw("GGUF").number(std::uint32_t{3}).number(std::uint64_t{0}).number(std::uint64_t{1});
  huge_array.string("k").number(gguf_writer::array).number(gguf_writer::text);
  huge_array.number(std::uint64_t{1} << 60);
  check_message(huge_array.bytes(), " is a truncated GGUF file");

  const auto with_tensor = [](const std::vector<std::uint64_t>& shape, std::uint32_t type) {
    return gguf_writer().add_tensor("t", shape, type, "").bytes();
  };
  check_message(with_tensor({1}, 0), " is a truncated GGUF file");
  check_message(with_tensor({std::uint64_t{1} << 62, 8}, 0),
                " is not a valid GGUF file: tensor 't' has an impossible shape");
  check_message(with_tensor({0}, 0),
                " is not a valid GGUF file: tensor 't' has an impossible shape");
  check_message(with_tensor({1, 1, 1, 1, 1}, 0),
                " is not a valid GGUF file: tensor 't' has too many axes");
  check_message(with_tensor({2, 16}, 8),
                " is not a valid GGUF file: tensor 't' has rows of broken blocks");
  check_message(with_tensor({32}, 14),
                ": tensor 't' is of type Q6_K; this example reads F32, F16, Q4_0, Q4_1 and Q8_0");
  check_message(gguf_writer().add("k", true).add("k", true).bytes(),
                " is not a valid GGUF file: metadata 'k' comes twice");
  check_message(gguf_writer().add("general.alignment", std::uint32_t{24}).bytes(),
                " is not a valid GGUF file: the alignment is not a power of two");
}
