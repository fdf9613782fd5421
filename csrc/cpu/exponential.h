// Powers as finely as weights of a softmax are worth.
#pragma once

#include "kernels.h"

namespace ff {
namespace {

// How finely the weights of a softmax are computed: float32 is what sums over float32 deserve, with
// errors of 7e-8; kBFloat16 is for weights that are rounded to bfloat16 next, which errs by 2e-3.
// kSums is for such weights whose sum is seen as a log-sum-exp. With errors of kBFloat16 that would
// be off by 2e-5 for ordinary scores and by 9e-5 for scores near 0; to compute all weights like
// this would take every forward 1 to 4 % longer.
enum class Precision { kFloat32, kSums, kBFloat16 };

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
  if constexpr (kPrecision == Precision::kSums) {
    // Degree 5 errs by 1e-7, and by 1e-8 at 1, where many scores near the largest one are.
    const Vec f = Vec::fraction(x);
    Vec p = Vec::set(1.879318617e-03f);
    p = Vec::fma(p, f, Vec::set(8.990994655e-03f));
    p = Vec::fma(p, f, Vec::set(5.581867695e-02f));
    p = Vec::fma(p, f, Vec::set(2.401592731e-01f));
    p = Vec::fma(p, f, Vec::set(6.931517124e-01f));
    return Vec::scale(Vec::fma(p, f, Vec::set(1.0f)), x);
  }
  const Vec bounded = Vec::for_scale(x), n = Vec::round(bounded);
  return scaled_power(bounded - n, n);
}

// exp(x), likewise.
template <Precision kPrecision>
inline Vec exp(Vec x) {
  const Vec log2e = Vec::set(1.44269504f);
  if constexpr (kPrecision != Precision::kFloat32) return exp2<kPrecision>(x * log2e);
  // The fraction by an fma with the same x: that of a rounded product would err by 2e-7 at x = -5.
  const Vec bounded = Vec::max(Vec::set(-200.0f), x);
  const Vec n = Vec::round(bounded * log2e);
  return scaled_power(Vec::fms(bounded, log2e, n), n);
}

}  // namespace
}  // namespace ff
