// Eight float lanes: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "calls.h"

namespace ff {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  __m256 v;

  static __m256i first(int64_t count) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), lanes);
  }

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const float* p, int64_t count) { return {_mm256_maskload_ps(p, first(count))}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int64_t count) const { _mm256_maskstore_ps(p, first(count), v); }

  static Vec load_bfloat16(const uint16_t* p, int64_t count) {
    const __m256i wide = _mm256_cvtepu16_epi32(load_16_bit(p, count));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }

  static Vec load_half(const uint16_t* p, int64_t count) {
    return {_mm256_cvtph_ps(load_16_bit(p, count))};
  }

  void store_bfloat16(uint16_t* p, int64_t count) const {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
    store_16_bit(p, count, _mm256_castsi256_si128(pairs));
  }

  void store_half(uint16_t* p, int64_t count) const {
    store_16_bit(p, count, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // All bits set where p[i] is true, none elsewhere.
  static Vec load_bool(const Bool* p, int64_t count) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, p, size_t(count));
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes)));
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
  }

  // Bit i: p[i], of up to 32.
  static uint32_t truths(const Bool* p, int64_t count) {
    if (count < 32) {
      uint32_t bits = 0;
      for (int64_t i = 0; i < count; ++i) bits |= uint32_t(p[i]) << i;
      return bits;
    }
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
    return ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
  }

  // Bit i: bit `index` of truths[i].
  static uint16_t lanes(const uint32_t* truths, int64_t index) {
    const __m256i bits = _mm256_loadu_si256((const __m256i*)truths);
    const __m256i sign = _mm256_sll_epi32(bits, _mm_cvtsi64_si128(31 - index));
    return uint16_t(_mm256_movemask_ps(_mm256_castsi256_ps(sign)));
  }

  // to[index * stride] = lanes(truths, index) of the first `count`.
  static void store_lanes(const uint32_t* truths, int64_t count, int64_t stride, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = lanes(truths, i);
  }

  // a in the lanes whose bit is set, else b.
  static Vec select(uint16_t lanes, Vec a, Vec b) {
    const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(lanes), own);
    return select(Vec{_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, own))}, a, b);
  }

  // a in the lanes whose bits are all set, else b where none is: the sign decides.
  static Vec select(Vec bits, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, bits.v)}; }

  // All bits set in the lanes where |a| > bound; not in those of a NaN.
  static Vec larger(Vec a, Vec bound) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
    return {_mm256_cmp_ps(size, bound.v, _CMP_GT_OQ)};
  }

  float total() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // Lane i: the sum of r[i], all in the same order.
  static Vec totals(const Vec* r) {
    return reduce(r, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
  }

  // Lane i: the maximum of r[i].
  static Vec maxima(const Vec* r) {
    return reduce(r, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
  }

  // Rows become columns.
  __attribute__((always_inline)) static void transpose(Vec* r) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
      pairs[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int j = 0; j < 4; ++j) {
      r[j].v = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x20);
      r[j + 4].v = _mm256_permute2f128_ps(fours[j], fours[j + 4], 0x31);
    }
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
  // The second operand where either is NaN.
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }

  static Vec round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }

  // What `scale` and the remainder after `round` take in the place of x: no -inf.
  static Vec for_scale(Vec x) { return max(set(-200.0f), x); }

  // x - floor(x), which rounding may make 1; some number from 0 to 1 for -inf.
  static Vec fraction(Vec x) {
    const Vec bounded = max(set(-127.0f), x);
    return bounded - Vec{_mm256_floor_ps(bounded.v)};
  }

  // a * 2^floor(x) for x up to 127; 0 below -126, where the numbers become subnormal.
  static Vec scale(Vec a, Vec x) {
    const __m256 n = _mm256_floor_ps(max(set(-127.0f), x).v);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
  }

 private:
  // Lane i: the lanes of r[i] taken together by `join`.
  template <class Join>
  static Vec reduce(const Vec* r, const Join& join) {
    __m256 two[4], four[2];
    for (int i = 0; i < 4; ++i)
      two[i] = join(_mm256_unpacklo_ps(r[2 * i].v, r[2 * i + 1].v),
                    _mm256_unpackhi_ps(r[2 * i].v, r[2 * i + 1].v));
    for (int i = 0; i < 2; ++i)
      four[i] = join(_mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0x44),
                     _mm256_shuffle_ps(two[2 * i], two[2 * i + 1], 0xee));
    return {join(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                 _mm256_permute2f128_ps(four[0], four[1], 0x31))};
  }

  static __m128i load_16_bit(const uint16_t* p, int64_t count) {
    if (count == kLanes) return _mm_loadu_si128((const __m128i*)p);
    uint16_t some[kLanes] = {};
    std::memcpy(some, p, size_t(count) * sizeof *p);
    return _mm_loadu_si128((const __m128i*)some);
  }

  static void store_16_bit(uint16_t* p, int64_t count, __m128i values) {
    if (count == kLanes) return _mm_storeu_si128((__m128i*)p, values);
    uint16_t all[kLanes];
    _mm_storeu_si128((__m128i*)all, values);
    std::memcpy(p, all, size_t(count) * sizeof *p);
  }
};

// Products of 8-bit integers, four to a lane: signed ones, broadcast, with unsigned ones; of even
// and odd numbers as 16 bits, since VPMADDUBSW would saturate. Sums are int32 in the bits of a Vec.
struct Int8Math {
  using Element = int8_t;
  static constexpr int kDepth = 4;
  struct Operand {
    __m256i even, odd;
  };

  static Operand broadcast(const int8_t* p) {
    int32_t all;
    std::memcpy(&all, p, sizeof all);
    const __m256i x = _mm256_set1_epi32(all);
    return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
  }
  static Operand load(const int8_t* p) {
    const __m256i w = _mm256_loadu_si256((const __m256i*)p);
    return {_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(w, 8)};
  }
  static Vec add_product(Operand a, Operand b, Vec sum) {
    const __m256i both =
        _mm256_add_epi32(_mm256_madd_epi16(a.even, b.even), _mm256_madd_epi16(a.odd, b.odd));
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(sum.v), both))};
  }

  // sum - offset in float32.
  static Vec to_float(Vec sum, int32_t offset) {
    const __m256i difference =
        _mm256_sub_epi32(_mm256_castps_si256(sum.v), _mm256_set1_epi32(offset));
    return {_mm256_cvtepi32_ps(difference)};
  }

  // The first `count` of some integers.
  static void store(int8_t* p, Vec integers, int64_t count) {
    const __m256i wide = _mm256_cvtps_epi32(integers.v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
    std::memcpy(p, &bytes, size_t(count));
  }
};

inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace
}  // namespace ff
