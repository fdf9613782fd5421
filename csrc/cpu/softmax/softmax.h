// Scores of one block, keys down and queries across, from products to exponentials.
#pragma once

#include <cmath>

#include "cpu/gemm/operands.h"

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

// exp(x), likewise.
template <Precision kPrecision>
inline Vec exp(Vec x) {
  const Vec log2e = Vec::set(1.44269504f);
  if constexpr (kPrecision == Precision::kBFloat16) return exp2<kPrecision>(x * log2e);
  // The fraction by an fma with the same x: that of a rounded product would err by 2e-7 at x = -5.
  const Vec bounded = Vec::max(Vec::set(-200.0f), x);
  const Vec n = Vec::round(bounded * log2e);
  return scaled_power(Vec::fms(bounded, log2e, n), n);
}

// A sum over keys in four chains: one chain of 256 positive terms errs by 4e-7, and that error is
// common to a whole row of weights.
struct FourSums {
  Vec part[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};

  Vec total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// The running maximum, sum and factor of the online softmax, one value per query.
struct Statistics {
  float *maximum, *sum, *rescale;

  void clear(int64_t columns) const {
    for (int64_t i = 0; i < columns; ++i) maximum[i] = -kInfinity, sum[i] = 0.0f;
  }
};

// The maximum with 0 in place of -inf, a row without a key so far: -inf - -inf would be NaN.
inline Vec finite(Vec maximum) {
  const Vec endless = Vec::larger(maximum, Vec::set(3.4028235e38f));
  return Vec::select(endless, Vec::max(maximum, Vec::zero()), maximum);
}

constexpr int64_t kFew = 3;  // queries; from 4 on the lanes of a panel are full enough

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

inline Base base_of(const Attention& p) {
  const bool few = p.q_len <= kFew || p.kv_len <= kFew;
  const bool added = p.mask.data && p.mask_type != Type::kBool;
  return few || added || !ordinary(p.scale) ? Base::kE : Base::kTwo;
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

// The maximum, in natural exponents, + log(sum); -inf for a row without a key.
inline float log_sum(float maximum, float sum, Base base) {
  if (sum == 0.0f) return -kInfinity;
  const double unit = base == Base::kTwo ? 0.69314718055994531 : 1.0;
  return float(double(maximum) * unit + std::log(double(sum)));
}

// Bits or numbers of a mask: kLanes of them along its rows or columns.
inline Vec mask_lanes(const void* data, Type type, int64_t offset, int64_t stride, int64_t count) {
  if (type != Type::kBool) {
    return with_type(type, [&](auto kind) {
      using T = decltype(kind);
      const auto* from = static_cast<const typename T::Element*>(data) + offset;
      return load_lanes<T>(from, stride, count);
    });
  }
  const Bool* from = static_cast<const Bool*>(data) + offset;
  if (stride == 1) return Vec::load_bool(from, count);
  Bool lanes[Vec::kLanes];
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i * stride];
  return Vec::load_bool(lanes, count);
}

// Scores of a block of keys, down, against a block of queries, across. They count in units: the
// product of a query and a key is `unit` times what stands there.
struct Scores {
  const Attention& p;
  int64_t b, h;
  Block queries;
  int64_t columns;
  float* data;
};

// Whether the diagonal hides some of a block's keys from some queries.
inline bool crosses_diagonal(const Scores& s, const Block& block) {
  return block.count > 0 && block[block.count - 1] >= s.p.keys_seen_by(s.queries[0]);
}

// The mask of one key for `count` queries from the `first` on.
inline Vec mask_lanes(const Scores& s, int64_t offset, int64_t first, int64_t count) {
  const Attention& p = s.p;
  if (p.mask.row == 0 || s.queries.adjacent()) {
    return mask_lanes(p.mask.data, p.mask_type, offset + s.queries[first] * p.mask.row, p.mask.row,
                      count);
  }
  float lanes[Vec::kLanes];
  for (int64_t i = count; i-- > 0;) {
    const int64_t row = s.queries[first + i] * p.mask.row;
    mask_lanes(p.mask.data, p.mask_type, offset + row, 1, 1).store(lanes + i, 1);
  }
  return Vec::load(lanes, count);
}

// Multiplies by `unit`, adds the mask, puts -inf where it or the diagonal hides a score, and takes
// the maximum of every query.
inline void mask_scores(const Scores& s, const Block& block, float unit, float* maximum) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Attention& p = s.p;
  const bool causal = crosses_diagonal(s, block);
  const bool logical = p.mask_type == Type::kBool;
  const bool turned = p.mask.column == 1 && p.mask.row != 0 && block.adjacent();
  const bool by_bits = p.mask.data && logical && turned;
  const Vec hidden = Vec::set(-kInfinity), scale = Vec::set(unit);
  const int64_t head = s.b * p.mask.batch + s.h * p.mask.head;
  for (int64_t lane = 0; lane < s.columns; lane += kLanes) {
    const int64_t left = s.queries.count - lane, some = left < kLanes ? left : kLanes;
    Vec largest = hidden;
    for (int64_t first = 0; first < block.count; first += kLanes) {
      const int64_t count = block.count - first < kLanes ? block.count - first : kLanes;
      Vec bias[kLanes];
      uint32_t truths[kLanes] = {};
      if (by_bits) {
        const Bool* mask = static_cast<const Bool*>(p.mask.data) + head + block[first];
        for (int64_t i = 0; i < some; ++i)
          truths[i] = Vec::truths(mask + s.queries[lane + i] * p.mask.row, count);
      } else if (p.mask.data && turned) {
        for (int64_t i = 0; i < kLanes; ++i)
          bias[i] = i < some ? mask_lanes(p.mask.data, p.mask_type,
                                          head + s.queries[lane + i] * p.mask.row + block[first], 1,
                                          count)
                             : Vec::zero();
        Vec::transpose(bias);
      } else if (p.mask.data) {
        for (int64_t k = 0; k < count; ++k)
          bias[k] = mask_lanes(s, head + block[first + k] * p.mask.column, lane, some);
      }
      for (int64_t k = 0; k < count; ++k) {
        float* at = s.data + (first + k) * s.columns + lane;
        Vec score = Vec::load(at) * scale;
        if (by_bits) {
          score = Vec::select(Vec::lanes(truths, k), score, hidden);
        } else if (p.mask.data) {
          score = logical ? Vec::select(bias[k], score, hidden) : score + bias[k];
        }
        score.store(at);
        if (causal) {
          const int64_t sees = block[first + k] - p.diagonal;  // the first query that does
          for (int64_t i = 0; i < some && s.queries[lane + i] < sees; ++i) at[i] = -kInfinity;
          score = Vec::load(at);
        }
        largest = Vec::max(score, largest);
      }
    }
    largest.store(maximum + lane);
  }
}

// Whether a mask can be had as bits before the product: bool, with its keys adjacent in memory and
// the diagonal elsewhere.
inline bool maskable_product(const Scores& s, const Block& block) {
  const Attention& p = s.p;
  return p.mask.data && p.mask_type == Type::kBool && p.mask.column == 1 && block.adjacent() &&
         !crosses_diagonal(s, block);
}

// The lanes of each key and register of queries that a mask leaves, which a product can store
// without another look at its scores.
inline void shown_lanes(const Scores& s, const Block& block, uint16_t* shown) {
  constexpr int64_t kLanes = Vec::kLanes, kBits = 32, kGroups = kLargestBlock / kBits;
  const Attention& p = s.p;
  const int64_t vectors = s.columns / kLanes;
  const int64_t head = s.b * p.mask.batch + s.h * p.mask.head;
  const Bool* mask = static_cast<const Bool*>(p.mask.data) + head + block[0];
  for (int64_t n = 0; n < vectors; ++n) {
    const int64_t left = s.queries.count - n * kLanes, some = left < kLanes ? left : kLanes;
    uint32_t truths[kGroups][kLanes];
    for (int64_t i = some; i < kLanes; ++i)
      for (int64_t k = 0; k < block.count; k += kBits) truths[k / kBits][i] = 0;
    for (int64_t i = 0; i < some; ++i) {
      const Bool* row = mask + s.queries[n * kLanes + i] * p.mask.row;
      int64_t k = 0;
      for (; k + kBits <= block.count; k += kBits)
        truths[k / kBits][i] = Vec::truths(row + k, kBits);
      if (k < block.count) truths[k / kBits][i] = Vec::truths(row + k, block.count - k);
    }
    for (int64_t k = 0; k < block.count; k += kBits) {
      const int64_t count = block.count - k < kBits ? block.count - k : kBits;
      Vec::store_lanes(truths[k / kBits], count, vectors, shown + k * vectors + n);
    }
  }
}

// StoreMaximum with -inf in the lanes that are not shown.
struct StoreShown {
  float* to;
  int64_t stride;
  float* maximum;
  const uint16_t* shown;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    const int64_t vectors = stride / Vec::kLanes;
    const Vec hidden = Vec::set(-kInfinity);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int64_t lane = column + n * Vec::kLanes;
      const uint16_t* lanes = shown + row * vectors + lane / Vec::kLanes;
      Vec largest = Vec::load(maximum + lane);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec score = Vec::select(lanes[r * vectors], sum[r][n], hidden);
        score.store(to + (row + r) * stride + lane);
        largest = Vec::max(score, largest);
      }
      largest.store(maximum + lane);
    }
  }
};

// How weights are kept, keys down and queries across, as the left operand of products with one row
// per query, summed over the keys (`store`, `by_query`), and of products with one row per key,
// summed over the queries (`store_row`, `by_key`).
template <class Math>
struct Weights;

template <>
struct Weights<Float32Math> {
  static constexpr Precision kPrecision = Precision::kFloat32;

  static void store(float* scores, int64_t key, int64_t columns, const Vec* weights,
                    int64_t count) {
    for (int64_t k = 0; k < count; ++k) weights[k].store(scores + (key + k) * columns);
  }

  static LeftColumns<Float32Math> by_query(const float* scores, int64_t columns) {
    return {scores, columns};
  }

  static void store_row(float* row, int64_t lane, Vec weights) { weights.store(row + lane); }

  static LeftRows<Float32Math> by_key(const float* scores, int64_t columns) {
    return {scores, columns};
  }
};

// base ^ (unit * score - offset) of one register of queries, over the scores and times the factors
// of dropout; returns the sums over the keys.
template <class Math, Base kBase, bool kDropout>
inline Vec weigh(int64_t count, int64_t columns, float unit, Vec offset, const float* dropout,
                 float* scores) {
  FourSums sum;
  const auto step = [&](int64_t j, int64_t some) __attribute__((always_inline)) {
    Vec weights[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (k >= some) continue;
      const int64_t at = (j + k) * columns;
      weights[k] =
          exponential<Weights<Math>::kPrecision, kBase>(Vec::load(scores + at), unit, offset);
      sum.part[k] = sum.part[k] + weights[k];
      if constexpr (kDropout) weights[k] = weights[k] * Vec::load(dropout + at);
    }
    Weights<Math>::store(scores, j, columns, weights, some);
  };
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) step(j, 4);
  if (j < count) step(j, count - j);
  return sum.total();
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
    const Vec sum = weigh_lane(block.count, columns, unit, offset, dropout + lane, scores + lane);
    const bool first = block.first == 0;
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
