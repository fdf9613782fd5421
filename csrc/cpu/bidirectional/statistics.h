// What backward.h takes from the score tiles before it makes gradients: statistics of the
// softmax over the rows of the scores and of that over their columns.
#pragma once

#include "forward.h"

namespace ff {
namespace {

// Per row or column of the scores: maximum, sum of exponentials, sum of exponentials times dP or
// dR. `finish` makes of them what the gradients multiply and subtract: 1 / sum and delta.
struct SideStatistics {
  float *maximum, *sum, *weighted, *grad_lse;

  SideStatistics at(int64_t i) const { return {maximum + i, sum + i, weighted + i, grad_lse + i}; }

  void clear(int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      maximum[i] = -kInfinity, sum[i] = weighted[i] = grad_lse[i] = 0.0f;
  }

  void finish(const Block& rows, const LseGradient& grad, int64_t b, int64_t h) const {
    for (int64_t i = 0; i < rows.count; ++i) {
      const bool dead = sum[i] == 0.0f;  // then its weights are 0
      weighted[i] = dead ? 0.0f : weighted[i] / sum[i];
      grad_lse[i] = dead ? 0.0f : grad.at(b, h, rows[i]);
      sum[i] = inverse(sum[i]);
    }
  }
};

// S and dP or dR of a block of keys, down, against a query tile, across; of a soft cap its
// derivative, too.
struct ScoreTile {
  float *scores, *grad_rows, *grad_columns, *derivative;
};

// Takes a score tile into the maxima of its rows and columns; `maximum` holds those of its
// queries, in units.
inline void add_maxima(const Scores& s, const Block& block, float unit, const float* maximum,
                       const SideStatistics* queries, const SideStatistics* keys) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Vec scale = Vec::set(unit), last = lanes_in_use(s.queries, s.columns - kLanes);
  for (int64_t lane = 0; lane < s.columns && queries; lane += kLanes) {
    const Vec largest = Vec::load(maximum + lane) * scale;
    Vec::max(largest, Vec::load(queries->maximum + lane)).store(queries->maximum + lane);
  }
  for (int64_t first = 0; first < block.count && keys; first += kLanes) {
    const int64_t count = block.count - first < kLanes ? block.count - first : kLanes;
    const Vec largest = key_maxima(s, first, count, last) * scale;
    Vec::max(largest, Vec::load(keys->maximum + first, count)).store(keys->maximum + first, count);
  }
}

// Takes a score tile into the sums of its queries.
inline void add_row_sums(const Scores& s, const Block& block, float unit, const float* grads,
                         const SideStatistics& queries) {
  for (int64_t lane = 0; lane < s.columns; lane += Vec::kLanes) {
    const Vec offset = finite(Vec::load(queries.maximum + lane));
    Vec sums[2];
    add_short_chains(
        block.count,
        [&](int64_t j, Vec(&part)[2]) __attribute__((always_inline)) {
          const int64_t e = j * s.columns + lane;
          const Vec weight = exponential(Vec::load(s.data + e), unit, offset);
          part[0] = part[0] + weight;
          part[1] = Vec::fma(weight, Vec::load(grads + e), part[1]);
        },
        sums);
    (Vec::load(queries.sum + lane) + sums[0]).store(queries.sum + lane);
    (Vec::load(queries.weighted + lane) + sums[1]).store(queries.weighted + lane);
  }
}

// Takes a score tile into the sums of its keys.
inline void add_column_sums(const Scores& s, const Block& block, float unit, const float* grads,
                            const SideStatistics& keys) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Vec last = lanes_in_use(s.queries, s.columns - kLanes);
  for (int64_t first = 0; first < block.count; first += kLanes) {
    const int64_t count = block.count - first < kLanes ? block.count - first : kLanes;
    Vec sums[kLanes], weighted_sums[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      sums[r] = weighted_sums[r] = Vec::zero();
      if (r >= count) continue;
      const int64_t at = (first + r) * s.columns;
      const Vec offset = finite(Vec::set(keys.maximum[first + r]));
      Vec sum = Vec::zero(), weighted = Vec::zero();
      const auto end_chain = [&] {
        sums[r] = sums[r] + sum, weighted_sums[r] = weighted_sums[r] + weighted;
        sum = weighted = Vec::zero();
      };
      for_lanes(s, last, [&](int64_t lane, const auto& select) {
        if (lane % (kShortChain / 4 * kLanes) == 0) end_chain();
        const Vec score = Vec::load(s.data + at + lane);
        const Vec weight = select(exponential(score, unit, offset), Vec::zero());
        sum = sum + weight;
        weighted = Vec::fma(weight, Vec::load(grads + at + lane), weighted);
      });
      end_chain();
    }
    const auto add = [&](float* total, const Vec* parts) {
      (Vec::load(total + first, count) + Vec::totals(parts)).store(total + first, count);
    };
    add(keys.sum, sums);
    add(keys.weighted, weighted_sums);
  }
}

}  // namespace
}  // namespace ff
