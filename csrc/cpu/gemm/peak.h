// The most that products can do: what shares of the peak in benchmarks are taken of.
#pragma once

#include "gemm.h"

namespace ff {
namespace {

// `rounds` times as many independent products as hide their latency; returns the floating-point
// operations.
template <class Math>
double multiply_only(int64_t rounds) {
  constexpr int kChains = Vec::kRegisters == 32 ? 24 : 12;
  typename Math::Element numbers[Vec::kLanes * Math::kDepth] = {};
  float begin[kChains * Vec::kLanes] = {};
  // Or the compiler would see that all is zero, and that the chains are equal.
  asm volatile("" : : "r"(numbers), "r"(begin) : "memory");
  const auto x = Math::broadcast(numbers), y = Math::load(numbers);
  Vec sum[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum[i] = Vec::load(begin + i * Vec::kLanes);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sum[i] = Math::add_product(x, y, sum[i]);
  }
  // Of zeros, in whatever type. Not unrolled, an index would keep all of them in memory.
#pragma GCC unroll 24
  for (int i = 1; i < kChains; ++i) sum[0] = sum[0] + sum[i];
  const double operations = 2.0 * Vec::kLanes * Math::kDepth * kChains * double(rounds);
  return operations + double(sum[0].total());
}

template <class HalfMath>
double peak_operations(Type type, int64_t rounds) {
  if (type == Type::kUInt8) return multiply_only<Int8Math>(rounds);
  if (kTakesAll<HalfMath> || type == Type::kBFloat16) return multiply_only<HalfMath>(rounds);
  return HalfMath::kFloat32->peak_operations(type, rounds);
}

}  // namespace
}  // namespace ff
