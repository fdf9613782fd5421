// Reads safetensors files: 8 bytes with the length of a header, the header in JSON, then the data
// (https://github.com/huggingface/safetensors#format). Whatever is wrong throws std::runtime_error.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"

namespace safetensors {

static_assert(std::endian::native == std::endian::little, "the format's numbers are little-endian");

struct Tensor {
  std::string type;  // as the header names it: F32, BF16, I64, U8, ...
  std::vector<int64_t> shape;
  const std::byte* data;
  uint64_t bytes;
};

// Bytes of a number, 0 where the type is unknown: whoever reads the tensor will be told.
inline uint64_t size_of(std::string_view type) {
  if (type == "BOOL" || type == "U8" || type == "I8") return 1;
  if (type == "U16" || type == "I16" || type == "F16" || type == "BF16") return 2;
  if (type == "U32" || type == "I32" || type == "F32") return 4;
  return type == "U64" || type == "I64" || type == "F64" ? 8 : 0;
}

template <class T>
constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<float> = "F32";
template <>
inline constexpr const char* kTypeName<uint8_t> = "U8";
template <>
inline constexpr const char* kTypeName<int64_t> = "I64";

inline std::string text_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape)
    text += (text.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  return "(" + text + ")";
}

// A file in memory. It is read, not mapped: one that somebody cuts off later would end the process.
class File {
 public:
  explicit File(const std::string& path) : path_(path) {
    const Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    struct stat about;
    if (file.number < 0 || fstat(file.number, &about) != 0) fail(std::strerror(errno));
    if (!S_ISREG(about.st_mode)) fail("is not a file");
    const auto bytes = uint64_t(about.st_size);
    uint64_t header = 0;
    if (bytes < sizeof header) fail("is too short for a safetensors file");
    load(file.number, &header, sizeof header);
    if (header > bytes - sizeof header)
      fail("is no safetensors file, or cut off: it has " + std::to_string(bytes) +
           " bytes, and a header of " + std::to_string(header) + " is announced");
    std::string text(header, '\0');
    load(file.number, text.data(), header);
    data_bytes_ = bytes - sizeof header - header;
    // A kernel may ask for aligned rows, and offsets are multiples of a number's size.
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(64, data_bytes_ / 64 * 64 + 64)));
    if (!data_) throw std::bad_alloc();
    load(file.number, data_.get(), data_bytes_);
    read_header(text);
  }

  const std::string& path() const { return path_; }

  const Tensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail("has no tensor '" + name + "'");
    return found->second;
  }

  // The numbers of a tensor of this type and shape, where -1 stands for any size.
  template <class T>
  const T* numbers(const std::string& name, const std::vector<int64_t>& shape) const {
    const Tensor& found = tensor(name);
    bool fits = found.type == kTypeName<T> && found.shape.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i)
      fits = shape[i] < 0 || shape[i] == found.shape[i];
    if (!fits)
      fail("tensor '" + name + "' is " + found.type + " " + text_of(found.shape) + ", expected " +
           kTypeName<T> + " " + text_of(shape));
    if (uintptr_t(found.data) % alignof(T) != 0) fail("tensor '" + name + "' is not aligned");
    return reinterpret_cast<const T*>(found.data);
  }

  const std::string& metadata(const std::string& key) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end()) fail("has no '" + key + "' in its metadata");
    return found->second;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ": " + what);
  }

 private:
  struct Descriptor {
    explicit Descriptor(int number) : number(number) {}
    Descriptor(const Descriptor&) = delete;
    ~Descriptor() {
      if (number >= 0) close(number);
    }
    const int number;
  };

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  void load(int file, void* to, uint64_t bytes) const {
    for (auto* at = static_cast<std::byte*>(to); bytes > 0;) {
      const ssize_t got = read(file, at, bytes);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail(std::strerror(errno));
      if (got == 0) fail("became shorter while it was read");
      at += got, bytes -= uint64_t(got);
    }
  }

  void read_header(const std::string& text) {
    Json json(text, path_ + ": header");
    json.object([&](const std::string& name) {
      if (name == "__metadata__") {
        json.object([&](const std::string& key) { metadata_[key] = json.string(); });
      } else if (!tensors_.emplace(name, read_tensor(&json, name)).second) {
        fail("has two tensors '" + name + "'");
      }
    });
    json.end();
  }

  Tensor read_tensor(Json* json, const std::string& name) const {
    Tensor found{};
    std::vector<int64_t> offsets;
    const auto sizes = [json](std::vector<int64_t>* to) {
      to->clear();
      json->array([&] { to->push_back(json->integer()); });
    };
    json->object([&](const std::string& key) {
      if (key == "dtype") {
        found.type = json->string();
      } else if (key == "shape") {
        sizes(&found.shape);
      } else if (key == "data_offsets") {
        sizes(&offsets);
      } else {
        json->skip();
      }
    });
    const std::string about = "tensor '" + name + "'";
    if (offsets.size() != 2 || offsets[0] < 0 || offsets[1] < offsets[0])
      fail(about + " has no data_offsets");
    if (uint64_t(offsets[1]) > data_bytes_)
      fail(about + " ends at byte " + std::to_string(offsets[1]) + " of the data, which has " +
           std::to_string(data_bytes_) + ": the file is cut off");
    found.data = data_.get() + offsets[0];
    found.bytes = uint64_t(offsets[1] - offsets[0]);
    uint64_t needed = size_of(found.type);
    for (const int64_t size : found.shape) {
      if (size < 0) fail(about + " has a negative size");
      if (__builtin_mul_overflow(needed, uint64_t(size), &needed)) fail(about + " is too large");
    }
    if (size_of(found.type) > 0 && needed != found.bytes)
      fail(about + " has " + std::to_string(found.bytes) + " bytes, but " + found.type + " " +
           text_of(found.shape) + " takes " + std::to_string(needed));
    return found;
  }

  std::string path_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::unique_ptr<std::byte, Free> data_;
  uint64_t data_bytes_ = 0;
};

}  // namespace safetensors
