// JSON (RFC 8259) as the headers of safetensors files have it, read once from front to back.
// Whatever is wrong throws std::runtime_error, which names the byte.
#pragma once

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

class Json {
 public:
  // `name`: of the text, for messages.
  Json(std::string_view text, std::string name) : text_(text), name_(std::move(name)) {}

  // {...}: `member(key)` reads or skips the value.
  template <class Member>
  void object(const Member& member) {
    list('{', '}', [&] {
      const std::string key = string();
      expect(':');
      member(key);
    });
  }

  // [...]: `item()` reads or skips it.
  template <class Item>
  void array(const Item& item) {
    list('[', ']', item);
  }

  std::string string() {
    expect('"');
    std::string found;
    while (true) {
      const char c = next();
      if (c == '"') return found;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      if (c == '\\') {
        escape(&found);
      } else {
        found += c;
      }
    }
  }

  int64_t integer() {
    const std::string_view number = number_text();
    int64_t found = 0;
    const char* end = number.data() + number.size();
    const auto [stop, error] = std::from_chars(number.data(), end, found);
    if (error != std::errc() || stop != end) fail("expected an integer of 64 bits");
    return found;
  }

  // A value of any kind.
  void skip() {
    switch (peek()) {
      case '{':
        return object([this](const std::string&) { skip(); });
      case '[':
        return array([this] { skip(); });
      case '"':
        string();
        return;
      case 't':
        return word("true");
      case 'f':
        return word("false");
      case 'n':
        return word("null");
      default:
        number_text();
    }
  }

  // Behind the value may be spaces and nothing else.
  void end() {
    peek();
    if (at_ < text_.size()) fail("expected the end");
  }

 private:
  static constexpr int kDeepest = 32;  // a hostile text is not to fill the stack

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(name_ + ": " + what + " at byte " + std::to_string(at_));
  }

  // The next byte that is no space, 0 at the end.
  char peek() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != text_.npos) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  char next() {
    if (at_ == text_.size()) fail("the text ends in a string");
    return text_[at_++];
  }

  bool take(char c) {
    const bool found = peek() == c && at_ < text_.size();
    at_ += found;
    return found;
  }

  void expect(char c) {
    if (!take(c)) fail(std::string("expected '") + c + "'");
  }

  void word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) fail("expected a value");
    at_ += expected.size();
  }

  template <class Item>
  void list(char open, char close, const Item& item) {
    expect(open);
    if (++depth_ > kDeepest) fail("too deep");
    if (!take(close)) {
      do item();
      while (take(','));
      expect(close);
    }
    --depth_;
  }

  std::string_view number_text() {
    peek();
    const size_t begin = at_;
    at_ = text_.find_first_not_of("+-.0123456789eE", begin);
    if (at_ == text_.npos) at_ = text_.size();
    if (at_ == begin) fail("expected a value");
    return text_.substr(begin, at_ - begin);
  }

  uint32_t hex() {
    uint32_t found = 0;
    const std::string_view digits = text_.substr(at_, 4);
    const char* end = digits.data() + digits.size();
    const auto [stop, error] = std::from_chars(digits.data(), end, found, 16);
    if (error != std::errc() || stop != end || digits.size() < 4) fail("expected four hex digits");
    at_ += 4;
    return found;
  }

  void escape(std::string* to) {
    const char c = next();
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeant = "\"\\/\b\f\n\r\t";
    if (const size_t i = kNames.find(c); i != kNames.npos) {
      *to += kMeant[i];
      return;
    }
    if (c != 'u') fail("an unknown escape");
    uint32_t code = hex();
    if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const uint32_t low = hex();
      if (low < 0xdc00 || low > 0xdfff) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    if (code >= 0xd800 && code < 0xe000) fail("half a surrogate pair");
    const auto follow = [&](int shift) { *to += char(0x80 | (code >> shift & 0x3f)); };
    if (code < 0x80) {
      *to += char(code);
    } else if (code < 0x800) {
      *to += char(0xc0 | code >> 6), follow(0);
    } else if (code < 0x10000) {
      *to += char(0xe0 | code >> 12), follow(6), follow(0);
    } else {
      *to += char(0xf0 | code >> 18), follow(12), follow(6), follow(0);
    }
  }

  std::string_view text_;
  std::string name_;
  size_t at_ = 0;
  int depth_ = 0;
};
