// The online softmax of Milakov and Gimelshein (2018) over blocks of keys, keys down and queries
// across: running statistics, and the weights of a block in the place of its scores.
#pragma once

#include "mask.h"
#include "packed_weights.h"

namespace ff {
namespace {

// A sum over keys in four chains: one chain of 256 positive terms errs by 4e-7, and that error is
// common to a whole row of weights.
struct FourSums {
  Vec part[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};

  Vec total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// Keys after which sums begin new chains. Of 256 weights that differ by a rounding or two, as
// scores times 1e-7 do, chains of 64 drop what tells them apart, and outputs and gradients of the
// row err by 4.5e-7 all together, three times the plain formula's error.
constexpr int64_t kShortChain = 64;

// Sums over keys: term(j, part) adds what key j is worth to the N numbers of a part.
template <int N, class Term>
inline void add_short_chains(int64_t count, const Term& term, Vec (&total)[N]) {
  for (int n = 0; n < N; ++n) total[n] = Vec::zero();
  for (int64_t j = 0; j < count;) {
    const int64_t end = count - j < kShortChain ? count : j + kShortChain;
    Vec part[4][N];
    for (int k = 0; k < 4; ++k)
      for (int n = 0; n < N; ++n) part[k][n] = Vec::zero();
    for (; j + 4 <= end; j += 4)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) term(j + k, part[k]);
    for (int k = 0; k < 3 && j < end; ++k, ++j) term(j, part[k]);
    for (int n = 0; n < N; ++n)
      total[n] = total[n] + ((part[0][n] + part[1][n]) + (part[2][n] + part[3][n]));
  }
}

// The running maximum, sum and factor of the online softmax, one value per query.
struct Statistics {
  float *maximum, *sum, *rescale;
  bool begun = false;  // before the first block

  void clear(int64_t columns) const {
    for (int64_t i = 0; i < columns; ++i) maximum[i] = -kInfinity, sum[i] = 0.0f;
  }
  void begin(int64_t columns, const FirstStatistics& first) {
    for (int64_t i = 0; i < columns; ++i) maximum[i] = first.maximum, sum[i] = first.sum;
    begun = first.sum > 0.0f;
  }
};

// base ^ (unit * score - offset) of one register of queries, over the scores and times the factors
// of dropout; returns the sums over the keys.
template <class Math, Base kBase, bool kDropout>
inline Vec weigh(int64_t count, int64_t columns, float unit, Vec offset, const float* dropout,
                 float* scores) {
  FourSums sum;
  Vec total = Vec::zero();
  const auto step = [&](int64_t j, int64_t some) __attribute__((always_inline)) {
    Vec weights[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (k >= some) continue;
      const int64_t at = (j + k) * columns;
      weights[k] =
          exponential<PackedWeights<Math>::kPrecision, kBase>(Vec::load(scores + at), unit, offset);
      sum.part[k] = sum.part[k] + weights[k];
      if constexpr (kDropout) weights[k] = weights[k] * Vec::load(dropout + at);
    }
    PackedWeights<Math>::store(scores, j, columns, weights, some);
  };
  int64_t j = 0;
  for (; j + kShortChain < count; total = total + sum.total(), sum = {})
    for (const int64_t end = j + kShortChain; j < end; j += 4) step(j, 4);
  for (; j + 4 <= count; j += 4) step(j, 4);
  if (j < count) step(j, count - j);
  return total + sum.total();
}

// One step of the online softmax of Milakov and Gimelshein (2018). The block's scores become
// base ^ (S - m') as the left operand of the product with the values, times the factors of dropout
// if there are any; the statistics move on, and rescale = base ^ (m - m') is what earlier sums have
// to be multiplied by. `maximum` holds that of the block, in units.
template <class Math, Base kBase>
inline void online_softmax(const Block& block, int64_t columns, float unit, const float* maximum,
                           const float* dropout, float* scores, const Statistics& s) {
  for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
    const Vec before = Vec::load(s.maximum + lane);
    const Vec now = Vec::max(Vec::load(maximum + lane) * Vec::set(unit), before);
    now.store(s.maximum + lane);
    const Vec offset = finite(now);
    const auto weigh_lane = dropout ? weigh<Math, kBase, true> : weigh<Math, kBase, false>;
    const float* factors = dropout ? dropout + lane : nullptr;
    const Vec sum = weigh_lane(block.count, columns, unit, offset, factors, scores + lane);
    const bool first = block.first == 0 && !s.begun;
    const Vec rescale =
        first ? Vec::zero() : exponential<Precision::kFloat32, kBase>(before, 1.0f, offset);
    rescale.store(s.rescale + lane);
    Vec::fma(Vec::load(s.sum + lane), rescale, sum).store(s.sum + lane);
  }
}

template <class Math>
inline void online_softmax(Base base, const Block& block, int64_t columns, float unit,
                           const float* maximum, const float* dropout, float* scores,
                           const Statistics& s) {
  const auto step =
      base == Base::kTwo ? online_softmax<Math, Base::kTwo> : online_softmax<Math, Base::kE>;
  step(block, columns, unit, maximum, dropout, scores, s);
}

}  // namespace
}  // namespace ff
