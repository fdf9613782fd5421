// Four float lanes: Arm's Advanced SIMD (NEON) on AArch64.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "calls.h"

namespace ff {
namespace {

inline float half_to_float(uint16_t half) {
  __fp16 value;
  std::memcpy(&value, &half, sizeof value);
  return float(value);
}

inline uint16_t float_to_half(float value) {
  const __fp16 half = __fp16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0.0f)}; }
  static Vec set(float x) { return {vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  void store(float* p) const { vst1q_f32(p, v); }

  static Vec load(const float* p, int64_t count) {
    float lanes[kLanes] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof(float));
    return load(lanes);
  }

  void store(float* p, int64_t count) const {
    float lanes[kLanes];
    store(lanes);
    std::memcpy(p, lanes, size_t(count) * sizeof(float));
  }

  static Vec load_bfloat16(const uint16_t* p, int64_t count) {
    return {vreinterpretq_f32_u32(vshll_n_u16(load_16_bit(p, count), 16))};
  }

  static Vec load_half(const uint16_t* p, int64_t count) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(load_16_bit(p, count)))};
  }

  void store_bfloat16(uint16_t* p, int64_t count) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t bias = vaddq_u32(odd, vdupq_n_u32(0x7fff));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, bias), 16);
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    store_16_bit(p, count, vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet)));
  }

  void store_half(uint16_t* p, int64_t count) const {
    store_16_bit(p, count, vreinterpret_u16_f16(vcvt_f16_f32(v)));
  }

  // All bits set where p[i] is true, none elsewhere.
  static Vec load_bool(const Bool* p, int64_t count) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, p, size_t(count));
    const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(bytes))));
    return {vreinterpretq_f32_u32(vcgtq_u32(wide, vdupq_n_u32(0)))};
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
    const uint32_t own[kLanes] = {1, 2, 4, 8};
    return {vbslq_f32(vtstq_u32(vdupq_n_u32(lanes), vld1q_u32(own)), a.v, b.v)};
  }

  // Bit by bit a where `bits` has ones, else b.
  static Vec select(Vec bits, Vec a, Vec b) {
    return {vbslq_f32(vreinterpretq_u32_f32(bits.v), a.v, b.v)};
  }

  // All bits set in the lanes where |a| > bound; not in those of a NaN.
  static Vec larger(Vec a, Vec bound) {
    return {vreinterpretq_f32_u32(vcgtq_f32(vabsq_f32(a.v), bound.v))};
  }

  float total() const { return vaddvq_f32(v); }

  // Lane i: the sum of r[i], all in the same order.
  static Vec totals(const Vec* r) {
    return {vpaddq_f32(vpaddq_f32(r[0].v, r[1].v), vpaddq_f32(r[2].v, r[3].v))};
  }

  // Lane i: the maximum of r[i].
  static Vec maxima(const Vec* r) {
    return {vpmaxq_f32(vpmaxq_f32(r[0].v, r[1].v), vpmaxq_f32(r[2].v, r[3].v))};
  }

  // Rows become columns.
  static void transpose(Vec* r) {
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r[0].v, r[1].v));
    const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(r[0].v, r[1].v));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r[2].v, r[3].v));
    const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(r[2].v, r[3].v));
    r[0].v = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    r[1].v = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    r[2].v = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    r[3].v = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
  }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec fms(Vec a, Vec b, Vec c) { return {vnegq_f32(vfmsq_f32(c.v, a.v, b.v))}; }

  // The second operand where either is NaN, as the x86 instruction.
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
  static Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }

  static Vec round(Vec a) { return {vrndnq_f32(a.v)}; }

  // What `scale` and the remainder after `round` take in the place of x: no -inf.
  static Vec for_scale(Vec x) { return max(set(-200.0f), x); }

  // x - floor(x), which rounding may make 1; some number from 0 to 1 for -inf.
  static Vec fraction(Vec x) {
    const Vec bounded = max(set(-127.0f), x);
    return bounded - Vec{vrndmq_f32(bounded.v)};
  }

  // a * 2^floor(x) for x up to 127; 0 below -126, where the numbers become subnormal.
  static Vec scale(Vec a, Vec x) {
    const int32x4_t power = vcvtmq_s32_f32(max(set(-127.0f), x).v);
    const int32x4_t bits = vshlq_n_s32(vaddq_s32(power, vdupq_n_s32(127)), 23);
    return {vmulq_f32(a.v, vreinterpretq_f32_s32(bits))};
  }

 private:
  static uint16x4_t load_16_bit(const uint16_t* p, int64_t count) {
    if (count == kLanes) return vld1_u16(p);
    uint16_t lanes[kLanes] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof(uint16_t));
    return vld1_u16(lanes);
  }

  static void store_16_bit(uint16_t* p, int64_t count, uint16x4_t values) {
    if (count == kLanes) return vst1_u16(p, values);
    uint16_t lanes[kLanes];
    vst1_u16(lanes, values);
    std::memcpy(p, lanes, size_t(count) * sizeof(uint16_t));
  }
};

// Products of 8-bit integers, four to a lane: signed ones, broadcast, with unsigned ones. Sums are
// int32 in the bits of a Vec.
struct Int8Math {
  using Element = int8_t;
  static constexpr int kDepth = 4;

#ifdef __ARM_FEATURE_MATMUL_INT8
  using Operand = int8x16_t;

  static Operand broadcast(const int8_t* p) { return four(p); }
  static Operand load(const int8_t* p) { return vld1q_s8(p); }
  static Vec add_product(Operand a, Operand b, Vec sum) {
    return {vreinterpretq_f32_s32(
        vusdotq_s32(vreinterpretq_s32_f32(sum.v), vreinterpretq_u8_s8(b), a))};
  }
#else
  struct Operand {
    int16x8_t low, high;  // of two lanes each
  };

  static Operand broadcast(const int8_t* p) {
    const int16x8_t two = vmovl_s8(vget_low_s8(four(p)));
    return {two, two};
  }
  static Operand load(const int8_t* p) {
    const uint8x16_t w = vreinterpretq_u8_s8(vld1q_s8(p));
    return {vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w))),
            vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(w)))};
  }
  static Vec add_product(Operand a, Operand b, Vec sum) {
    const int32x4_t low = vpaddq_s32(vmull_s16(vget_low_s16(a.low), vget_low_s16(b.low)),
                                     vmull_s16(vget_high_s16(a.low), vget_high_s16(b.low)));
    const int32x4_t high = vpaddq_s32(vmull_s16(vget_low_s16(a.high), vget_low_s16(b.high)),
                                      vmull_s16(vget_high_s16(a.high), vget_high_s16(b.high)));
    const int32x4_t total = vaddq_s32(vreinterpretq_s32_f32(sum.v), vpaddq_s32(low, high));
    return {vreinterpretq_f32_s32(total)};
  }
#endif

  // sum - offset in float32.
  static Vec to_float(Vec sum, int32_t offset) {
    return {vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_f32(sum.v), vdupq_n_s32(offset)))};
  }

  // The first `count` of some integers.
  static void store(int8_t* p, Vec integers, int64_t count) {
    const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(integers.v));
    int8_t bytes[8];
    vst1_s8(bytes, vmovn_s16(vcombine_s16(words, words)));
    std::memcpy(p, bytes, size_t(count));
  }

 private:
  static int8x16_t four(const int8_t* p) {
    int32_t all;
    std::memcpy(&all, p, sizeof all);
    return vreinterpretq_s8_s32(vdupq_n_s32(all));
  }
};

}  // namespace
}  // namespace ff
