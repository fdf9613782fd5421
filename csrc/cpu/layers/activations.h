// Activation functions of a register, in float32.
#pragma once

#include "cpu/softmax/exponential.h"

namespace ff {
namespace {

inline Vec negative(Vec x) { return Vec::zero() - x; }
inline Vec minimum(Vec a, Vec b) { return negative(Vec::max(negative(a), negative(b))); }

inline Vec between(Vec low, Vec x, Vec high) { return Vec::max(low, minimum(x, high)); }

// erf(x) as x P(x^2) / Q(x^2) by a minimax fit on |x| <= 3.9, behind which it is 1; errs by 3e-7.
inline Vec erf(Vec x) {
  const Vec end = Vec::set(3.9f), one = Vec::set(1.0f);
  const Vec outside = Vec::larger(x, end), sign = between(negative(one), x, one);
  x = between(negative(end), x, end);
  const Vec t = x * x;
  Vec p = Vec::set(2.0506388e-06f);
  p = Vec::fma(p, t, Vec::set(2.8743394e-04f));
  p = Vec::fma(p, t, Vec::set(3.8357042e-03f));
  p = Vec::fma(p, t, Vec::set(5.2963328e-02f));
  p = Vec::fma(p, t, Vec::set(1.9191320e-01f));
  p = Vec::fma(p, t, Vec::set(1.1283790e+00f));
  Vec q = Vec::set(3.8232138e-05f);
  q = Vec::fma(q, t, Vec::set(1.1814557e-03f));
  q = Vec::fma(q, t, Vec::set(1.5106862e-02f));
  q = Vec::fma(q, t, Vec::set(1.1474678e-01f));
  q = Vec::fma(q, t, Vec::set(5.0341046e-01f));
  q = Vec::fma(q, t, one);
  return Vec::select(outside, sign, x * p / q);
}

// 1 / (1 + exp(-x)), of exponentials that cannot overflow.
inline Vec sigmoid(Vec x) {
  const Vec one = Vec::set(1.0f), absolute = Vec::max(x, negative(x));
  const Vec below = exp<Precision::kFloat32>(minimum(x, Vec::zero()));
  return below / (one + exp<Precision::kFloat32>(negative(absolute)));
}

// The argument of a maximum that stays if it is NaN stands second.
inline Vec activate(Activation activation, Vec x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return Vec::max(Vec::zero(), x);
    case Activation::kGelu: {
      const Vec half = x * Vec::set(0.5f);
      return Vec::fma(half, erf(x * Vec::set(0.70710678f)), half);
    }
    case Activation::kGeluTanh: {
      // 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
      const Vec cubic = Vec::fma(x * x, Vec::set(0.044715f * 1.5957691f), Vec::set(1.5957691f));
      return x * sigmoid(x * cubic);
    }
    case Activation::kSilu:
      return x * sigmoid(x);
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace ff
