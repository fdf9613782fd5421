// What the checks of an instruction set share: FF_SIMD names the header of its vector type.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include FF_SIMD

#ifdef FF_BFLOAT16
// What a set with products of bfloat16 leaves to another one, which no check calls.
namespace ff {
#if defined(__x86_64__)
extern const KernelTable avx512_kernels{};
#else
extern const KernelTable neon_kernels{};
#endif
}  // namespace ff
#endif

namespace {

using ff::Bool;
using ff::Type;
using ff::Vec;

constexpr int64_t kLanes = Vec::kLanes;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kEndless = std::numeric_limits<float>::infinity();

int failures = 0;

// Prints the message of what does not hold, for the first few.
__attribute__((format(printf, 2, 3))) void expect(bool holds, const char* message, ...) {
  if (holds) return;
  if (++failures > 20) return;
  va_list arguments;
  va_start(arguments, message);
  std::printf("WRONG ");
  std::vprintf(message, arguments);
  std::printf("\n");
  va_end(arguments);
}

bool same(float a, float b) { return (std::isnan(a) && std::isnan(b)) || a == b; }

// a * b + c rounded once, or through double as sets without the instruction do.
bool is_fma(float x, float a, float b, float c) {
  return same(x, std::fma(a, b, c)) || same(x, float(double(a) * double(b) + double(c)));
}

struct Lanes {
  float x[kLanes];

  Lanes() = default;
  Lanes(Vec v) { v.store(x); }
  operator Vec() const { return Vec::load(x); }
  float& operator[](int64_t i) { return x[i]; }
  float operator[](int64_t i) const { return x[i]; }
};

class Random {
 public:
  float normal() { return normal_(engine_); }
  uint32_t bits() { return uint32_t(engine_()); }

  std::vector<float> normals(int64_t count) {
    std::vector<float> numbers(static_cast<size_t>(count));
    for (float& number : numbers) number = normal();
    return numbers;
  }

 private:
  std::mt19937 engine_{1};
  std::normal_distribution<float> normal_;
};

int finish(const char* what) {
  std::printf("%s: %s\n", what, failures ? "WRONG" : "right");
  return failures != 0;
}

}  // namespace
