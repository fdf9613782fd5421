// Four float lanes in the compiler's own vector type: runs on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../bfloat16.h"

namespace ff {
namespace {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    bits = 0x7f800000u | (magnitude << 13);
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    value = float(magnitude) * 0x1p-24f;  // subnormal: exact
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x47800000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {  // subnormal or zero: let the adder of float32 round
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return sign | uint16_t(bits - 0x3f000000u);
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return sign | uint16_t((bits - 0x38000000u) >> 13);
}

struct Vec {
  using Native = float __attribute__((vector_size(16), aligned(4), may_alias));
  using Integers = int32_t __attribute__((vector_size(16), aligned(4), may_alias));
  using Doubles = double __attribute__((vector_size(32), aligned(8), may_alias));
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  Native v;

  static Vec zero() { return {Native{}}; }
  static Vec set(float x) { return {Native{x, x, x, x}}; }
  static Vec load(const float* p) { return {*reinterpret_cast<const Native*>(p)}; }
  void store(float* p) const { *reinterpret_cast<Native*>(p) = v; }

  static Vec load_bfloat16(const uint16_t* p) {
    return {Native{bfloat16_to_float(p[0]), bfloat16_to_float(p[1]), bfloat16_to_float(p[2]),
                   bfloat16_to_float(p[3])}};
  }

  static Vec load_half(const uint16_t* p) {
    return {
        Native{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])}};
  }

  void store_bfloat16(uint16_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_bfloat16(v[i]);
  }

  void store_half(uint16_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
  }

  float total() const { return (v[0] + v[1]) + (v[2] + v[3]); }

  friend Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }

  // Through double, where the product is exact: a product rounded to float32 would make sums
  // 1.4 times as wrong as everybody else's. Machines without FMA are old; right beats fast.
  static Vec fma(Vec a, Vec b, Vec c) {
    const Doubles product =
        __builtin_convertvector(a.v, Doubles) * __builtin_convertvector(b.v, Doubles);
    return {__builtin_convertvector(product + __builtin_convertvector(c.v, Doubles), Native)};
  }

  // The second operand where either is NaN, as the x86 instruction.
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

  static Vec round(Vec a) {
    const Native magic = set(12582912.0f).v;  // 1.5 * 2^23 pushes the fraction out
    return {(a.v + magic) - magic};
  }

  // a * 2^n for an integral n in [-126, 127].
  static Vec scale(Vec a, Vec n) {
    Integers bits = __builtin_convertvector(n.v, Integers);
    bits = (bits + 127) << 23;
    Native power;
    std::memcpy(&power, &bits, sizeof power);
    return {a.v * power};
  }

  // 0 where a < bound, else b; a NaN in a keeps b.
  static Vec zero_below(Vec a, Vec bound, Vec b) {
    const Native zeros{};
    return {a.v < bound.v ? zeros : b.v};
  }
};

}  // namespace
}  // namespace ff
