// Activation functions of a register, in float32. GELUs and SiLU are max(x, 0) - |x| w(-|x|), with
// a weight w that falls from 1/2 to 0: its errors hardly count where x is positive, and where x is
// negative nothing cancels, so that the result is as accurate as the weight.
#pragma once

#include "cpu/softmax/exponential.h"

namespace ff {
namespace {

inline Vec negative(Vec x) { return Vec::zero() - x; }

// The normal distribution's Phi(x) for x <= 0, as 1 / (2 (1 + p(x))^16), where p is small as long
// as Phi is large. The minimax fit on [-5, 0] errs by 2e-8 of 1 - Phi and 6e-6 of Phi; below, it
// falls to 0 as well. 1e-7 of Phi would take two more terms and 12 % more time, and with 2^p(x) in
// place of the power 14 %, on AVX2 33 %.
inline Vec normal_tail(Vec x) {
  const Vec square = x * x, one = Vec::set(1.0f);
  Vec even = Vec::set(1.568742078e-07f), odd = Vec::set(1.135124421e-06f);
  even = Vec::fma(even, square, Vec::set(7.640164768e-06f));
  odd = Vec::fma(odd, square, Vec::set(-4.998276927e-05f));
  even = Vec::fma(even, square, Vec::set(2.949137888e-05f));
  odd = Vec::fma(odd, square, Vec::set(-3.287286730e-03f));
  even = Vec::fma(even, square, Vec::set(2.113702148e-02f));
  odd = Vec::fma(odd, square, Vec::set(-4.986783490e-02f));
  Vec p = Vec::fma(even, square, odd * x);
  for (int i = 0; i < 3; ++i) p = Vec::fma(p, p, p + p);  // (1 + p)^2 - 1
  return Vec::set(0.5f) / Vec::fma(p, p + Vec::set(2.0f), one);
}

// 1 / (1 + 2^(-x factor)), of which the exponential cannot overflow for x <= 0.
inline Vec sigmoid(Vec x, Vec factor) {
  const Vec power = power_of_product(x, factor);
  return power / (Vec::set(1.0f) + power);
}

// The weight of an activation that has one. That of GELU ends where the formula does in double, as
// 1 + erf and 1 + tanh are 0.
inline Vec weight(Activation activation, Vec x) {
  if (activation == Activation::kSilu) return sigmoid(x, Vec::set(1.44269504f));
  if (activation == Activation::kQuickGelu) return sigmoid(x, Vec::set(2.45546696f));
  // (1 + tanh(u)) / 2 = sigmoid(2 u)
  constexpr float kFactor = 2.3022082f;  // 2 sqrt(2 / pi) log2(e)
  const Vec found =
      activation == Activation::kGelu
          ? normal_tail(x)
          : sigmoid(x, Vec::fma(x * x, Vec::set(0.044715f * kFactor), Vec::set(kFactor)));
  return Vec::select(Vec::larger(found, Vec::set(0x1p-54f)), found, Vec::zero());
}

inline Vec activate(Activation activation, Vec x) {
  if (activation == Activation::kNone) return x;
  const Vec above = Vec::max(Vec::zero(), x);  // NaN stays, as the second
  if (activation == Activation::kRelu) return above;
  // -|x|, bounded where all weights are 0: infinity times 0 would be NaN.
  const Vec size = Vec::max((x - above) - above, Vec::set(-200.0f));
  return Vec::fma(size, weight(activation, size), above);
}

}  // namespace
}  // namespace ff
