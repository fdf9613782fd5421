// AVX-512 with products of bfloat16 pairs (VDPBF16PS) and of 8-bit integers (VPDPBUSD): two and
// four times the products per instruction.
#pragma once

#include "cpu/api.h"
#include "avx512.h"

namespace ff {

extern const KernelTable avx512_kernels;

namespace {

// Products of bfloat16 operands, two to a lane: sum + a0 * b0 + a1 * b1. The instruction rounds
// once per product and takes subnormal operands for zero.
struct BFloat16Math {
  using Element = uint16_t;
  static constexpr int kDepth = 2;
  static constexpr const KernelTable* kFloat32 = &avx512_kernels;
  using Operand = __m512bh;

  // In line, since clang 19 without optimisation clears most of an operand before it hands it over.
  [[gnu::always_inline]] static Operand broadcast(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return (Operand)_mm512_set1_epi32(pair);
  }

  [[gnu::always_inline]] static Operand load(const uint16_t* p) {
    return (Operand)_mm512_loadu_si512(p);
  }
  [[gnu::always_inline]] static Operand load(const uint16_t* p, int64_t count) {
    return (Operand)_mm512_maskz_loadu_epi32(Vec::first(count), p);
  }
  [[gnu::always_inline]] static Vec add_product(Operand a, Operand b, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, a, b)};
  }

  // Lane i holds low[i] and high[i], rounded.
  static void store_pairs(uint16_t* p, Vec low, Vec high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(interleave(), halves));
  }

  // The pairs of two rows of `count` numbers, zeros up to `columns`; no `high` is a row of zeros.
  static void store_pairs(uint16_t* p, const uint16_t* low, const uint16_t* high, int64_t count,
                          int64_t columns) {
    const __mmask32 some = __mmask32((uint64_t{1} << count) - 1);
    const __m512i a = _mm512_maskz_loadu_epi16(some, low);
    const __m512i b = high ? _mm512_maskz_loadu_epi16(some, high) : _mm512_setzero_si512();
    const __m512i from = _mm512_add_epi16(interleave(), _mm512_set1_epi32(16 << 16));
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a, from, b));
    if (columns <= Vec::kLanes) return;
    const __m512i next = _mm512_add_epi16(from, _mm512_set1_epi16(16));
    _mm512_storeu_si512(p + 2 * Vec::kLanes, _mm512_permutex2var_epi16(a, next, b));
  }

  // The bits of `count` pairs, zeros after them.
  static Vec load_pairs(const uint16_t* p, int64_t count) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi32(Vec::first(count), p))};
  }

 private:
  // 0, 16, 1, 17, ...
  static __m512i interleave() {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i doubled = _mm512_or_si512(steps, _mm512_slli_epi32(steps, 16));
    return _mm512_add_epi16(doubled, _mm512_slli_epi32(_mm512_set1_epi32(16), 16));
  }
};

}  // namespace
}  // namespace ff
