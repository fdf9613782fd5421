// From scores to weights: exponentials, and the units and bases that scores come in.
#pragma once

#include <cmath>

#include "cpu/gemm/gemm.h"

namespace ff {
namespace {

// How finely the weights of a softmax are computed: float32 is what sums over float32 deserve, with
// errors of 7e-8; kBFloat16 is for weights that are rounded to bfloat16 next, which errs by 2e-3.
enum class Precision { kFloat32, kBFloat16 };

// 2^(f + n) for |f| <= 1/2 by a minimax polynomial. Degree 6 errs by 2e-9; 5 would add 8e-8, too
// much where a softmax has a handful of keys.
inline Vec scaled_power(Vec f, Vec n) {
  Vec p = Vec::set(1.535336196e-04f);
  p = Vec::fma(p, f, Vec::set(1.339887502e-03f));
  p = Vec::fma(p, f, Vec::set(9.618436918e-03f));
  p = Vec::fma(p, f, Vec::set(5.550332367e-02f));
  p = Vec::fma(p, f, Vec::set(2.402264774e-01f));
  p = Vec::fma(p, f, Vec::set(6.931471825e-01f));
  return Vec::scale(Vec::fma(p, f, Vec::set(1.0f)), n);
}

// 2^x for x <= 0 (a little above is fine); NaN stays, -inf gives 0.
template <Precision kPrecision>
inline Vec exp2(Vec x) {
  if constexpr (kPrecision == Precision::kBFloat16) {
    const Vec f = Vec::fraction(x);  // in [0, 1]: degree 3 errs by 9e-5
    Vec p = Vec::set(7.706704736e-02f);
    p = Vec::fma(p, f, Vec::set(2.276449949e-01f));
    p = Vec::fma(p, f, Vec::set(6.951167583e-01f));
    return Vec::scale(Vec::fma(p, f, Vec::set(1.0f)), x);
  }
  const Vec bounded = Vec::for_scale(x), n = Vec::round(bounded);
  return scaled_power(bounded - n, n);
}

// 2^(a b) for products of 0 to -2^22. The fraction is that of an fma: a rounded product's would err
// by 2e-7 where the product is -7.
inline Vec power_of_product(Vec a, Vec b) {
  const Vec n = Vec::round(a * b);
  return scaled_power(Vec::fms(a, b, n), n);
}

// exp(x), as exp2.
template <Precision kPrecision>
inline Vec exp(Vec x) {
  const Vec log2e = Vec::set(1.44269504f);
  if constexpr (kPrecision == Precision::kBFloat16) return exp2<kPrecision>(x * log2e);
  return power_of_product(Vec::max(Vec::set(-200.0f), x), log2e);
}

// The maximum with 0 in place of -inf, a row without a key so far: -inf - -inf would be NaN.
inline Vec finite(Vec maximum) {
  const Vec endless = Vec::larger(maximum, Vec::set(3.4028235e38f));
  return Vec::select(endless, Vec::max(maximum, Vec::zero()), maximum);
}

constexpr int64_t kDecodeLength = 3;  // queries; from 4 on the lanes of a tile are full enough

// Whether a scale is one that models have. Scores by another may be about as large as a float32 can
// be, and products of operands as small.
inline bool ordinary(float scale) {
  return std::fabs(scale) >= 0x1p-16f && std::fabs(scale) <= 0x1p16f;
}

// Whether a call multiplies in bfloat16, where the instruction set does: its products lose numbers
// below 1e-38, which another scale brings back.
inline bool narrow_products(const Attention& p) {
  return p.type == Type::kBFloat16 && ordinary(p.scale);
}

// The base that scores and their maxima are exponents of. Two saves four instructions a weight, but
// a mask is added to natural exponents, as finfo.min would overflow when multiplied by log2(e), and
// so would scores by large scales; and of few scores single roundings are all the error there is.
enum class Base { kE, kTwo };

inline Base base_of(const Attention& p, bool few_keys) {
  const bool few = p.q_len <= kDecodeLength || few_keys;
  const bool added = (p.mask.data && p.mask_type != Type::kBool) || p.positions.data;
  return few || added || !ordinary(p.scale) ? Base::kE : Base::kTwo;
}

inline Base base_of(const Attention& p) { return base_of(p, p.kv_len <= kDecodeLength); }

// A piece of a call (split_kv.h) has the base of the whole, be its own keys as few as they may.
inline Base base_of(const AttentionForward& p) {
  return base_of(p, !p.sums && p.kv_len <= kDecodeLength);
}

// What turns natural exponents into those of a base.
inline float exponents_per_e(Base base) { return base == Base::kTwo ? 1.44269504f : 1.0f; }

// How a score comes from a query and a key: unit * (factor * query . key).
struct Scaling {
  float factor, unit;
};

// The factor is at most 1, or queries times it could overflow and keys of 0 make NaN of that. The
// unit is a power of two, which rounds nothing, and neither 0 nor infinite: scores of -inf are
// hidden. The sign alone is the factor of bfloat16, since the rest would round, and of large
// scales, beside which queries are so small that it might as well.
template <class Math>
inline Scaling scaling_of(float scale, Base base) {
  const float all = scale * exponents_per_e(base);
  int exponent = 0;
  __builtin_frexpf(all, &exponent);
  const bool large = std::fabs(scale) > 1.0f && !ordinary(scale);
  if (Math::kDepth > 1 || large) return {std::copysign(1.0f, all), std::fabs(all)};
  exponent = exponent > -126 ? exponent : -126;  // a subnormal unit may be taken for 0
  return {__builtin_ldexpf(all, -exponent), __builtin_ldexpf(1.0f, exponent)};
}

// base ^ (unit * score - maximum), exactly 1 at the maximum if the unit is a power of two.
template <Precision kPrecision = Precision::kFloat32, Base kBase = Base::kE>
inline Vec exponential(Vec score, float unit, Vec maximum) {
  const Vec x = Vec::fma(score, Vec::set(unit), Vec::zero() - maximum);
  return kBase == Base::kTwo ? exp2<kPrecision>(x) : exp<kPrecision>(x);
}

// 1 / sum; 0 for a row without a key.
inline float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// The maximum, in natural exponents, + log(sum); -inf for a row without a key. A float32 less 1 is
// exact in double, and log1p, unlike log, is the same symbol in every glibc since the first.
inline float log_sum(float maximum, float sum, Base base) {
  if (sum == 0.0f) return -kInfinity;
  const double unit = base == Base::kTwo ? 0.69314718055994531 : 1.0;
  return float(double(maximum) * unit + std::log1p(double(sum) - 1.0));
}

}  // namespace
}  // namespace ff
