// Tail queries: those that a head has beyond whole registers of them, where they would leave most
// lanes of another one empty: their scores are dot products with lanes along the head dim, R
// queries to a row of K, so that 16 sums make one register of R queries by 16 / R keys.
#pragma once

#include "cpu/gemm/packing.h"
#include "cpu/softmax/online_softmax.h"

namespace ff {
namespace {

// More would take longer than a register with empty lanes.
template <class Math>
constexpr int64_t kMostTail =
    Vec::kLanes == 16 && Math::kDepth == 1 ? 8 : Vec::kLanes / (4 * Math::kDepth);

// How many queries of each head that are. Whatever else is made of scores, but what a position
// table adds, and dropout, wants lanes of queries.
template <class Math>
int64_t tail_queries(const Attention& p) {
  const int64_t tail = p.q_len % Vec::kLanes;
  const bool shaped = p.softcap > 0.0f || p.alibi.data;
  const bool plain = !p.mask.data && !p.windowed() && !shaped && !p.dropout;
  const bool wide = 2 * p.value_dim > Vec::kLanes;
  return plain && wide && p.q_len > Vec::kLanes && tail <= kMostTail<Math> ? tail : 0;
}

// The power of two that R is for so many queries.
inline int64_t tail_columns(int64_t queries) {
  int64_t columns = 1;
  while (columns < queries) columns *= 2;
  return columns;
}

// Rows of queries for the products below, zeros up to whole registers.
template <class Math>
Right<Math> tail_rows(const Slice& from, const Block& block, int64_t dim, float factor,
                      float* buffer) {
  const int64_t width = padded(Packing<Math>::steps(dim)) * Math::kDepth;
  auto* to = reinterpret_cast<typename Math::Element*>(buffer);
  for (int64_t i = 0; i < tail_columns(block.count); ++i) {
    const int64_t row = block[i < block.count ? i : block.count - 1];  // the last one again
    Packing<Math>::row(from, row, dim, width, factor, to + i * width);
  }
  return {to, width};
}

// What a position table adds to products of a tail's queries, times their unit. Without one these
// stay.
struct TailBias {
  const Scores& scores;
  const Block& block;
  float factor;

  // What is left of the unit.
  float unit() const { return scores.p.positions.data ? 1.0f : factor; }

  // Of R queries by the keys `first`, `first` + `step`, ..., the last of them again.
  template <int R>
  Vec add(Vec product, int64_t first, int64_t step) const {
    const PositionBias& table = scores.p.positions;
    if (!table.data) return product;
    float lanes[Vec::kLanes];
    for (int64_t i = 0; i < Vec::kLanes; ++i) {
      const int64_t k = first + i / R * step, last = block.count - 1;
      const int64_t query = i % R < scores.queries.count ? i % R : scores.queries.count - 1;
      lanes[i] = *table.at(scores.h, scores.queries[query], block[k < last ? k : last]);
    }
    return Vec::fma(product, Vec::set(factor), Vec::load(lanes));
  }
};

// Scores of `count` keys: register v holds R queries by kLanes / R keys, as the weights are kept.
// In pairs of registers one has the even keys and one the odd ones. `maximum` gets one.
template <class Math, int R>
void tail_scores(const LeftRows<Math>& key, const Right<Math>& query, int64_t count, int64_t steps,
                 const TailBias& bias, float* scores, float* maximum) {
  constexpr int64_t kLanes = Vec::kLanes, kDepth = Math::kDepth, kKeys = kLanes / R;
  Vec largest = Vec::set(-kInfinity);
  for (int64_t j = 0; j < count; j += kKeys * kDepth) {
    for (int64_t first = j; first < j + kDepth; ++first, scores += kLanes) {
      const typename Math::Element* rows[kKeys];
#pragma GCC unroll 16
      for (int64_t g = 0; g < kKeys; ++g) {
        const int64_t k = first + g * kDepth;
        rows[g] = key.data + (k < count ? k : count - 1) * key.row;
      }
      Vec sum[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) sum[i] = Vec::zero();
      const auto step = [&](int64_t s, const auto& load) __attribute__((always_inline)) {
        typename Math::Operand x[R];
#pragma GCC unroll 8
        for (int64_t q = 0; q < R; ++q) x[q] = Math::load(query.data + q * query.step + s * kDepth);
#pragma GCC unroll 16
        for (int64_t g = 0; g < kKeys; ++g) {
          const typename Math::Operand y = load(rows[g] + s * kDepth);
#pragma GCC unroll 8
          for (int64_t q = 0; q < R; ++q)
            sum[g * R + q] = Math::add_product(x[q], y, sum[g * R + q]);
        }
      };
      int64_t s = 0;
      for (; s + kLanes <= steps; s += kLanes) step(s, [](const auto* p) { return Math::load(p); });
      if (s < steps) step(s, [&](const auto* p) { return Math::load(p, steps - s); });
      Vec score = bias.template add<R>(Vec::totals(sum), first, kDepth);
      if (first + (kKeys - 1) * kDepth >= count) {
        score.store(scores);
        for (int64_t i = 0; i < kLanes; ++i)
          if (first + i / R * kDepth >= count) scores[i] = -kInfinity;
        score = Vec::load(scores);
      }
      score.store(scores);
      largest = Vec::max(score, largest);
    }
  }
  largest.store(maximum);
}

// Lane i of the result: join of all lanes i % R, i % R + R, ...
template <int R, class Join>
inline Vec fold(Vec lanes, const Join& join) {
  float all[2 * Vec::kLanes];
  for (int width = R; width < Vec::kLanes; width *= 2) {  // lane i with lane i + width
    lanes.store(all);
    lanes.store(all + Vec::kLanes);
    lanes = join(lanes, Vec::load(all + width));
  }
  return lanes;
}

// online_softmax for scores as above. Of `maximum` lane i belongs to query i % R.
template <class Math, Base kBase, int R>
void tail_softmax(int64_t count, float unit, const float* maximum, float* scores,
                  const Statistics& s) {
  constexpr int64_t kLanes = Vec::kLanes;
  float lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = s.maximum[i % R];
  const Vec before = Vec::load(lanes);
  const Vec now = fold<R>(Vec::max(Vec::load(maximum) * Vec::set(unit), before), Vec::max);
  const Vec offset = finite(now);
  const Vec rescale = exponential<Precision::kFloat32, kBase>(before, 1.0f, offset);
  constexpr int64_t kTile = kLanes / R * Math::kDepth;
  const int64_t registers = (count + kTile - 1) / kTile * Math::kDepth;
  FourSums sum;
  Vec total = Vec::zero();
  for (int64_t v = 0; v < registers; v += Math::kDepth) {
    if (v % kShortChain == 0) total = total + sum.total(), sum = {};
    Vec weights[Math::kDepth];
    for (int64_t k = 0; k < Math::kDepth; ++k) {
      const Vec score = Vec::load(scores + (v + k) * kLanes);
      weights[k] = exponential<PackedWeights<Math>::kPrecision, kBase>(score, unit, offset);
      Vec& part = sum.part[(v + k) % 4];
      part = part + weights[k];
    }
    PackedWeights<Math>::store(scores, v, kLanes, weights, Math::kDepth);
  }
  total = fold<R>(total + sum.total(), [](Vec a, Vec b) { return a + b; });
  now.store(s.maximum);
  rescale.store(s.rescale);
  Vec::fma(Vec::load(s.sum), rescale, total).store(s.sum);
}

// A block of keys for the tail of a head's queries: `scores` become the weights, the left operand
// of the product with the values, and the statistics move on.
template <class Math>
void attend_tail(const LeftRows<Math>& key, const Right<Math>& query, int64_t count, int64_t steps,
                 int64_t columns, Base base, const TailBias& bias, float* maximum, float* scores,
                 const Statistics& s) {
  const auto run = [&]<int R>() {
    if constexpr (R <= kMostTail<Math>) {
      tail_scores<Math, R>(key, query, count, steps, bias, scores, maximum);
      const auto softmax =
          base == Base::kTwo ? tail_softmax<Math, Base::kTwo, R> : tail_softmax<Math, Base::kE, R>;
      softmax(count, bias.unit(), maximum, scores, s);
    }
  };
  if (columns == 1) run.template operator()<1>();
  if (columns == 2) run.template operator()<2>();
  if (columns == 4) run.template operator()<4>();
  if (columns == 8) run.template operator()<8>();
}

}  // namespace
}  // namespace ff
