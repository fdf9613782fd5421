// Four float lanes in the compiler's own vector type: runs on every machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "calls.h"
#include "bfloat16.h"

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
  // Behind the type, clang passes over `aligned` and stores whole vectors where floats may lie.
  using Native __attribute__((vector_size(16), aligned(4), may_alias)) = float;
  using Integers __attribute__((vector_size(16), aligned(4), may_alias)) = int32_t;
  using Doubles __attribute__((vector_size(32), aligned(8), may_alias)) = double;
  static_assert(alignof(Native) == alignof(float));
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  Native v;

  static Vec zero() { return {Native{}}; }
  static Vec set(float x) { return {Native{x, x, x, x}}; }
  static Vec load(const float* p) { return {*reinterpret_cast<const Native*>(p)}; }
  void store(float* p) const { *reinterpret_cast<Native*>(p) = v; }

  static Vec load(const float* p, int64_t count) {
    Vec result = zero();
    for (int64_t i = 0; i < count; ++i) result.v[i] = p[i];
    return result;
  }

  void store(float* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
  }

  static Vec load_bfloat16(const uint16_t* p, int64_t count) {
    Vec result = zero();
    for (int64_t i = 0; i < count; ++i) result.v[i] = bfloat16_to_float(p[i]);
    return result;
  }

  static Vec load_half(const uint16_t* p, int64_t count) {
    Vec result = zero();
    for (int64_t i = 0; i < count; ++i) result.v[i] = half_to_float(p[i]);
    return result;
  }

  void store_bfloat16(uint16_t* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) p[i] = float_to_bfloat16(v[i]);
  }

  void store_half(uint16_t* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) p[i] = float_to_half(v[i]);
  }

  // All bits set where p[i] is true, none elsewhere.
  static Vec load_bool(const Bool* p, int64_t count) {
    Integers bits{};
    for (int64_t i = 0; i < count; ++i) bits[i] = p[i] ? -1 : 0;
    return {reinterpret_cast<Native>(bits)};
  }

  // Bit i: p[i], of up to 32.
  static uint32_t truths(const Bool* p, int64_t count) {
    uint32_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= uint32_t(p[i]) << i;
    return bits;
  }

  // Bit i: bit `index` of truths[i].
  static uint16_t lanes(const uint32_t* truths, int64_t index) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= (truths[i] >> index & 1) << i;
    return uint16_t(bits);
  }

  // to[index * stride] = lanes(truths, index) of the first `count`.
  static void store_lanes(const uint32_t* truths, int64_t count, int64_t stride, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = lanes(truths, i);
  }

  // a in the lanes whose bit is set, else b.
  static Vec select(uint16_t lanes, Vec a, Vec b) {
    Vec result = b;
    for (int i = 0; i < kLanes; ++i)
      if (lanes >> i & 1) result.v[i] = a.v[i];
    return result;
  }

  // Bit by bit a where `bits` has ones, else b.
  static Vec select(Vec bits, Vec a, Vec b) {
    const Integers chosen = reinterpret_cast<Integers>(bits.v);
    return {reinterpret_cast<Native>((reinterpret_cast<Integers>(a.v) & chosen) |
                                     (reinterpret_cast<Integers>(b.v) & ~chosen))};
  }

  // All bits set in the lanes where |a| > bound; not in those of a NaN.
  static Vec larger(Vec a, Vec bound) {
    const Integers size = reinterpret_cast<Integers>(a.v) & 0x7fffffff;
    return {reinterpret_cast<Native>(reinterpret_cast<Native>(size) > bound.v)};
  }

  float total() const { return (v[0] + v[1]) + (v[2] + v[3]); }

  // Lane i: the sum of r[i], all in the same order.
  static Vec totals(const Vec* r) {
    return {Native{r[0].total(), r[1].total(), r[2].total(), r[3].total()}};
  }

  // Lane i: the maximum of r[i].
  static Vec maxima(const Vec* r) {
    Vec result = r[0];
    for (int i = 0; i < kLanes; ++i) {
      const Native& x = r[i].v;
      const float low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
      result.v[i] = low > high ? low : high;
    }
    return result;
  }

  // Rows become columns.
  static void transpose(Vec* r) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        const float below = r[i].v[j];
        r[i].v[j] = r[j].v[i];
        r[j].v[i] = below;
      }
  }

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
  static Vec fms(Vec a, Vec b, Vec c) { return fma(a, b, {-c.v}); }

  // The second operand where either is NaN, as the x86 instruction.
  static Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
  static Vec abs(Vec a) { return {a.v < 0.0f ? 0.0f - a.v : a.v}; }
  static Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }

  // For |a| below 2^22.
  static Vec round(Vec a) {
    const Native magic = set(12582912.0f).v;  // 1.5 * 2^23 pushes the fraction out
    return {(a.v + magic) - magic};
  }

  // What `scale` and the remainder after `round` take in the place of x: no -inf.
  static Vec for_scale(Vec x) { return max(set(-200.0f), x); }

  // x - floor(x), which rounding may make 1; some number from 0 to 1 for -inf.
  static Vec fraction(Vec x) {
    const Vec bounded = max(set(-127.0f), x);
    return bounded - floor(bounded);
  }

  // a * 2^floor(x) for x up to 127; 0 below -126, where the numbers become subnormal.
  static Vec scale(Vec a, Vec x) {
    Integers bits = __builtin_convertvector(floor(max(set(-127.0f), x)).v, Integers);
    bits = (bits + 127) << 23;
    return {a.v * reinterpret_cast<Native>(bits)};
  }

 private:
  static Vec floor(Vec a) {
    const Native nearest = round(a).v;
    return {nearest > a.v ? nearest - 1.0f : nearest};
  }
};

// Products of 8-bit integers, four to a lane: signed ones, broadcast, with unsigned ones. Sums are
// int32 in the bits of a Vec.
struct Int8Math {
  using Element = int8_t;
  static constexpr int kDepth = 4;
  struct Operand {
    Vec::Integers numbers[kDepth];  // number k of all lanes
  };

  static Operand broadcast(const int8_t* p) {
    Operand x{};
    for (int k = 0; k < kDepth; ++k) x.numbers[k] += p[k];
    return x;
  }
  static Operand load(const int8_t* p) {
    Operand w;
    for (int k = 0; k < kDepth; ++k)
      for (int i = 0; i < Vec::kLanes; ++i) w.numbers[k][i] = uint8_t(p[i * kDepth + k]);
    return w;
  }
  static Vec add_product(const Operand& a, const Operand& b, Vec sum) {
    auto total = reinterpret_cast<Vec::Integers>(sum.v);
    for (int k = 0; k < kDepth; ++k) total += a.numbers[k] * b.numbers[k];
    return {reinterpret_cast<Vec::Native>(total)};
  }

  // sum - offset in float32.
  static Vec to_float(Vec sum, int32_t offset) {
    return {__builtin_convertvector(reinterpret_cast<Vec::Integers>(sum.v) - offset, Vec::Native)};
  }

  // The first `count` of some integers.
  static void store(int8_t* p, Vec integers, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = int8_t(integers.v[i]);
  }
};

}  // namespace
}  // namespace ff
