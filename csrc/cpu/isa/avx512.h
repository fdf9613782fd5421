// Sixteen float lanes: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "calls.h"

namespace ff {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  __m512 v;

  static __mmask16 first(int64_t count) { return __mmask16((1u << count) - 1); }

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t count) {
    return {_mm512_maskz_loadu_ps(first(count), p)};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int64_t count) const { _mm512_mask_storeu_ps(p, first(count), v); }

  static Vec load_bfloat16(const uint16_t* p, int64_t count) {
    const __m512i wide = _mm512_cvtepu16_epi32(load_16_bit(p, count));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }

  static Vec load_half(const uint16_t* p, int64_t count) {
    return {_mm512_cvtph_ps(load_16_bit(p, count))};
  }

  void store_bfloat16(uint16_t* p, int64_t count) const {
#ifdef __AVX512BF16__
    store_16_bit(p, count, (__m256i)_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, quiet);
    store_16_bit(p, count, _mm512_cvtepi32_epi16(kept));
#endif
  }

  void store_half(uint16_t* p, int64_t count) const {
    store_16_bit(p, count, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // All bits set where p[i] is true, none elsewhere.
  static Vec load_bool(const Bool* p, int64_t count) {
    const __m128i bytes = _mm_maskz_loadu_epi8(first(count), p);
    return {_mm512_castsi512_ps(_mm512_movm_epi32(_mm_test_epi8_mask(bytes, bytes)))};
  }

  // Bit i: p[i], of up to 32.
  static uint32_t truths(const Bool* p, int64_t count) {
    const __mmask32 some = __mmask32((uint64_t{1} << count) - 1);
    const __m256i bytes = _mm256_maskz_loadu_epi8(some, p);
    return _mm256_test_epi8_mask(bytes, bytes);
  }

  // Bit i: bit `index` of truths[i].
  static uint16_t lanes(const uint32_t* truths, int64_t index) {
    return _mm512_test_epi32_mask(_mm512_loadu_si512(truths), _mm512_set1_epi32(1 << index));
  }

  // to[index * stride] = lanes(truths, index) of the first `count`.
  static void store_lanes(const uint32_t* truths, int64_t count, int64_t stride, uint16_t* to) {
    __m512i bits = _mm512_loadu_si512(truths);
    for (int64_t i = 0; i < count; ++i, to += stride) {
      *to = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1));
      bits = _mm512_srli_epi32(bits, 1);
    }
  }

  // a in the lanes whose bit is set, else b.
  static Vec select(uint16_t lanes, Vec a, Vec b) {
    return {_mm512_mask_blend_ps(lanes, b.v, a.v)};
  }

  // Bit by bit a where `bits` has ones, else b.
  static Vec select(Vec bits, Vec a, Vec b) {
    const __m512i chosen = _mm512_ternarylogic_epi32(
        _mm512_castps_si512(bits.v), _mm512_castps_si512(a.v), _mm512_castps_si512(b.v), 0xca);
    return {_mm512_castsi512_ps(chosen)};
  }

  // All bits set in the lanes where |a| > bound; not in those of a NaN.
  static Vec larger(Vec a, Vec bound) {
    const __mmask16 found = _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), bound.v, _CMP_GT_OQ);
    return {_mm512_castsi512_ps(_mm512_movm_epi32(found))};
  }

  float total() const { return _mm512_reduce_add_ps(v); }

  // Lane i: the sum of r[i], all in the same order.
  static Vec totals(const Vec* r) {
    return reduce(r, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
  }

  // Lane i: the maximum of r[i].
  static Vec maxima(const Vec* r) {
    return reduce(r, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  }

  // Rows become columns.
  __attribute__((always_inline)) static void transpose(Vec* r) {
    __m512d pairs[16];
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_castps_pd(_mm512_unpacklo_ps(r[i].v, r[i + 1].v));
      pairs[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(r[i].v, r[i + 1].v));
    }
    __m512 fours[16];  // fours[4 * i + j]: rows 4 i .. 4 i + 3 of columns j, j + 4, j + 8, j + 12
    for (int i = 0; i < 16; i += 4) {
      fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i], pairs[i + 2]));
      fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i], pairs[i + 2]));
      fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[i + 1], pairs[i + 3]));
      fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[i + 1], pairs[i + 3]));
    }
    for (int j = 0; j < 4; ++j) {
      const __m512 even = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0x88);
      const __m512 odd = _mm512_shuffle_f32x4(fours[j], fours[j + 4], 0xdd);
      const __m512 even2 = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0x88);
      const __m512 odd2 = _mm512_shuffle_f32x4(fours[j + 8], fours[j + 12], 0xdd);
      r[j].v = _mm512_shuffle_f32x4(even, even2, 0x88);
      r[j + 4].v = _mm512_shuffle_f32x4(odd, odd2, 0x88);
      r[j + 8].v = _mm512_shuffle_f32x4(even, even2, 0xdd);
      r[j + 12].v = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
  // The second operand where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

  // What `scale` and the remainder after `round` take in the place of x.
  static Vec for_scale(Vec x) { return x; }  // scale(NaN, -inf) is 0
  static Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT)}; }
  // x - floor(x), which rounding may make 1; 0 for -inf.
  static Vec fraction(Vec x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF)}; }
  // a * 2^floor(x) for x up to 127; 0 for -inf.
  static Vec scale(Vec a, Vec x) { return {_mm512_scalef_ps(a.v, x.v)}; }

 private:
  // Lane i: the lanes of r[i] taken together by `join`.
  template <class Join>
  static Vec reduce(const Vec* r, const Join& join) {
    __m512 eight[8], four[4];
    for (int i = 0; i < 8; ++i)
      eight[i] = join(_mm512_shuffle_f32x4(r[i].v, r[i + 8].v, 0x44),
                      _mm512_shuffle_f32x4(r[i].v, r[i + 8].v, 0xee));
    for (int i = 0; i < 4; ++i)
      four[i] = join(_mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88),
                     _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xdd));
    const __m512d even = _mm512_castps_pd(
        join(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1])));
    const __m512d odd = _mm512_castps_pd(
        join(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3])));
    const __m512 joined = join(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)),
                               _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    return {_mm512_shuffle_f32x4(joined, joined, 0xd8)};  // fours of rows stood as 0, 2, 1, 3
  }

  static __m256i load_16_bit(const uint16_t* p, int64_t count) {
    if (count == kLanes) return _mm256_loadu_si256((const __m256i*)p);
    return _mm256_maskz_loadu_epi16(first(count), p);
  }

  static void store_16_bit(uint16_t* p, int64_t count, __m256i values) {
    if (count == kLanes) return _mm256_storeu_si256((__m256i*)p, values);
    _mm256_mask_storeu_epi16(p, first(count), values);
  }
};

// Products of 8-bit integers, four to a lane: signed ones, broadcast, with unsigned ones. Sums are
// int32 in the bits of a Vec: as __m512i, GCC 12 would keep 24 of them in memory.
struct Int8Math {
  using Element = int8_t;
  static constexpr int kDepth = 4;

#ifdef __AVX512VNNI__
  using Operand = __m512i;

  static Operand broadcast(const int8_t* p) { return four(p); }
  static Operand load(const int8_t* p) { return _mm512_loadu_si512(p); }
  static Vec add_product(Operand a, Operand b, Vec sum) {
    return as_sum(_mm512_dpbusd_epi32(bits(sum), b, a));
  }
#else
  // The even and the odd numbers as 16 bits: VPMADDUBSW would saturate.
  struct Operand {
    __m512i even, odd;
  };

  static Operand broadcast(const int8_t* p) {
    const __m512i x = four(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
  }
  static Operand load(const int8_t* p) {
    const __m512i w = _mm512_loadu_si512(p);
    return {_mm512_and_si512(w, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(w, 8)};
  }
  static Vec add_product(Operand a, Operand b, Vec sum) {
    const __m512i both =
        _mm512_add_epi32(_mm512_madd_epi16(a.even, b.even), _mm512_madd_epi16(a.odd, b.odd));
    return as_sum(_mm512_add_epi32(bits(sum), both));
  }
#endif

  // sum - offset in float32.
  static Vec to_float(Vec sum, int32_t offset) {
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(bits(sum), _mm512_set1_epi32(offset)))};
  }

  // The first `count` of some integers.
  static void store(int8_t* p, Vec integers, int64_t count) {
    _mm512_mask_cvtepi32_storeu_epi8(p, Vec::first(count), _mm512_cvtps_epi32(integers.v));
  }

 private:
  static __m512i four(const int8_t* p) {
    int32_t all;
    __builtin_memcpy(&all, p, sizeof all);
    return _mm512_set1_epi32(all);
  }

  static __m512i bits(Vec sum) { return _mm512_castps_si512(sum.v); }
  static Vec as_sum(__m512i sum) { return {_mm512_castsi512_ps(sum)}; }
};

inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace
}  // namespace ff
