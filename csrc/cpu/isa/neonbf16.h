// NEON with products of bfloat16 pairs (BFDOT) and of 8-bit integers (USDOT): Armv8.6 or the
// extensions of 8.2.
#pragma once

#include "cpu/api.h"
#include "neon.h"

namespace ff {

extern const KernelTable neon_kernels;

namespace {

// Products of bfloat16 operands, two to a lane: sum + (a0 * b0 + a1 * b1). The instruction rounds
// to odd and takes subnormal numbers for zero.
struct BFloat16Math {
  using Element = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr const KernelTable* kFloat32 = &neon_kernels;
  using Operand = bfloat16x8_t;

  static Operand broadcast(const uint16_t* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }

  static Operand load(const uint16_t* p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }
  static Operand load(const uint16_t* p, int64_t count) {
    return vreinterpretq_bf16_f32(load_pairs(p, count).v);
  }
  static Vec add_product(Operand a, Operand b, Vec sum) { return {vbfdotq_f32(sum.v, a, b)}; }

  // Lane i holds low[i] and high[i], rounded.
  static void store_pairs(uint16_t* p, Vec low, Vec high) {
    vst2_u16(p, {vreinterpret_u16_bf16(vcvt_bf16_f32(low.v)),
                 vreinterpret_u16_bf16(vcvt_bf16_f32(high.v))});
  }

  // The pairs of two rows of `count` numbers, zeros up to `columns`; no `high` is a row of zeros.
  static void store_pairs(uint16_t* p, const uint16_t* low, const uint16_t* high, int64_t count,
                          int64_t columns) {
    uint16_t rows[2][2 * Vec::kLanes] = {};
    std::memcpy(rows[0], low, size_t(count) * sizeof(uint16_t));
    if (high) std::memcpy(rows[1], high, size_t(count) * sizeof(uint16_t));
    for (int64_t i = 0; i < columns; i += Vec::kLanes)
      vst2_u16(p + 2 * i, {vld1_u16(rows[0] + i), vld1_u16(rows[1] + i)});
  }

  // The bits of `count` pairs, zeros after them.
  static Vec load_pairs(const uint16_t* p, int64_t count) {
    uint32_t pairs[Vec::kLanes] = {};
    std::memcpy(pairs, p, size_t(count) * sizeof(uint32_t));
    return {vreinterpretq_f32_u32(vld1q_u32(pairs))};
  }
};

}  // namespace
}  // namespace ff
