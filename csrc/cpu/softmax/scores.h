// The score policy: all that a call does to the products of queries and keys before the softmax
// over them, for every kernel. A kind of mask is a field of the call and its part in
//
//     range      keys_seen: the keys that a block of queries may see; others are not multiplied.
//                Segments and prefixes are ranges of each query, made before (key_ranges.h)
//     shape      ScoreShape: a soft cap with its derivative, then ALiBi and position tables
//                (position_table.h)
//     sinks      FirstStatistics: weights that stand before those of the keys
//     mask       mask.h: float and bool masks, and what diagonal and window hide within the range
//
// in this order, which is FlashAttention's. Keys that padding hides are left out before
// (visible_keys in cpu/positions.h).
//
// Scores stand keys down and queries across, unless a function says that it has one query.
#pragma once

#include "cpu/positions.h"
#include "exponential.h"

namespace ff {
namespace {

// Scores of a block of keys, down, against a block of queries, across. They count in units: the
// product of a query and a key is `unit` times what stands there.
struct Scores {
  const Attention& p;
  int64_t b, h;
  Block queries;
  int64_t columns;
  float* data;
  float* derivative = nullptr;  // of the soft cap, in the same places, for who wants it
};

// The keys from `first` to before `end`.
struct KeyRange {
  int64_t first, end;
};

// Those that any of these queries of entry b may see.
inline KeyRange keys_seen(const Attention& p, int64_t b, const Block& queries) {
  if (!p.ranges.first)
    return {p.first_seen_by(b, queries[0]), p.keys_seen_by(b, queries[queries.count - 1])};
  KeyRange any{p.kv_len, 0};
  for (int64_t i = 0; i < queries.count; ++i) {
    const int64_t first = p.first_seen_by(b, queries[i]), end = p.keys_seen_by(b, queries[i]);
    if (first >= end) continue;
    any = {first < any.first ? first : any.first, end > any.end ? end : any.end};
  }
  return any.first < any.end ? any : KeyRange{0, 0};
}

// Those that all of `count` queries from the `first` on see, but of scattered segments.
inline KeyRange keys_seen_by_all(const Scores& s, int64_t first, int64_t count) {
  const Attention& p = s.p;
  if (!p.ranges.first)
    return {p.first_seen_by(s.b, s.queries[first + count - 1]),
            p.keys_seen_by(s.b, s.queries[first])};
  KeyRange all{0, p.kv_len};
  if (p.ranges.scattered[s.b]) return {p.kv_len, 0};
  for (int64_t i = first; i < first + count; ++i) {
    const int64_t from = p.first_seen_by(s.b, s.queries[i]);
    const int64_t end = p.keys_seen_by(s.b, s.queries[i]);
    all = {from > all.first ? from : all.first, end < all.end ? end : all.end};
  }
  return all;
}

// Whether a query sees a key.
inline bool sees(const Attention& p, int64_t b, int64_t query, int64_t key) {
  const KeyRanges& r = p.ranges;
  return p.first_seen_by(b, query) <= key && key < p.keys_seen_by(b, query) &&
         (!r.first || !r.scattered[b] ||
          r.q_segments[b * p.q_len + query] == r.k_segments[b * p.kv_len + key]);
}

// Whether diagonal, window or segments hide some of a block's keys from some queries.
inline bool crosses_range(const Scores& s, const Block& block) {
  if (block.count == 0) return false;
  const KeyRange all = keys_seen_by_all(s, 0, s.queries.count);
  return block[0] < all.first || block[block.count - 1] >= all.end;
}

// What the statistics of a row begin with, as exponents of `base`: its sink, or nothing.
struct FirstStatistics {
  float maximum = -kInfinity, sum = 0.0f;

  FirstStatistics(const Attention& p, int64_t h, Base base) {
    if (!p.sinks.data || p.sinks.at(h) == -kInfinity) return;
    maximum = p.sinks.at(h) * exponents_per_e(base), sum = 1.0f;
  }
};

// Whether scores are more than products, before masks.
inline bool is_shaped(const Attention& p) {
  return p.softcap > 0.0f || p.alibi.data || p.positions.data;
}

// cap * tanh(score / cap).
struct SoftCap {
  static constexpr float kSaturated = 9.02f;  // tanh of what is larger is 1 in float32
  Vec inverse, cap;

  // tanh(x) / x = (1 + top x^2) / (1 + bottom x^2), which errs by 2e-8 up to kSaturated.
  struct Rational {
    Vec top = Vec::set(1.338442235e-8f), bottom = Vec::set(7.790306204e-7f);

    explicit Rational(Vec square) {
      top = Vec::fma(top, square, Vec::set(2.063592829e-5f));
      bottom = Vec::fma(bottom, square, Vec::set(3.288528326e-4f));
      top = Vec::fma(top, square, Vec::set(3.497464604e-3f));
      bottom = Vec::fma(bottom, square, Vec::set(2.588438783e-2f));
      top = Vec::fma(top, square, Vec::set(1.338269328e-1f));
      bottom = Vec::fma(bottom, square, Vec::set(4.671601454e-1f));
    }
  };

  explicit SoftCap(float cap) : inverse(Vec::set(1.0f / cap)), cap(Vec::set(cap)) {}

  // Up to 1, tanh(x) / x is 1 less a rational function of x^2, so that small scores stay what they
  // are; from there on tanh(x) is 1 less 2 / (exp(2 x) + 1). What is taken off is the smaller part
  // of either, and so are its errors.
  Vec operator()(Vec score) const {
    const Vec x = score * inverse, square = x * x, one = Vec::set(1.0f), zero = Vec::zero();
    const Rational tanh(square);
    const Vec less = (tanh.bottom - tanh.top) / Vec::fma(tanh.bottom, square, one);
    const Vec near = Vec::fma(zero - score * square, less, score);

    const Vec size = Vec::max(zero - x, x);
    const Vec power = exp<Precision::kFloat32>(size * Vec::set(-2.0f));
    const Vec end = Vec::min(cap, Vec::max(zero - cap, score));
    const Vec far = Vec::fma(zero - end, (power + power) / (one + power), end);
    return Vec::select(Vec::larger(x, Vec::set(1.001f)), far, near);
  }

  // By the rational function alone, in which one score in ten is 2 roundings of float32 off: where
  // the products are of bfloat16, whose roundings are 65536 times as large.
  Vec narrow(Vec score) const {
    const Vec bound = Vec::set(kSaturated), one = Vec::set(1.0f);
    const Vec x = Vec::min(bound, Vec::max(Vec::zero() - bound, score * inverse)), square = x * x;
    const Rational tanh(square);
    return cap * x * (Vec::fma(tanh.top, square, one) / Vec::fma(tanh.bottom, square, one));
  }

  // d capped / d score = 1 - tanh^2, but for the differences, in which nothing is left of a score
  // that is far beyond the cap.
  Vec derivative(Vec score) const {
    const Vec x = score * inverse;
    const Vec power = exp<Precision::kFloat32>(Vec::max(x, Vec::zero() - x) * Vec::set(-2.0f));
    const Vec sum = Vec::set(1.0f) + power;
    return Vec::set(4.0f) * power / (sum * sum);
  }
};

// How far queries are from the key `key`, kLanes of them from `lane` on: below 0 where they stand
// left of it.
inline Vec distances(const Scores& s, int64_t lane, int64_t key) {
  float lanes[Vec::kLanes];
  const int64_t offset = s.p.diagonal - key;
  if (s.queries.adjacent()) {
    for (int64_t i = 0; i < Vec::kLanes; ++i) lanes[i] = float(i);
    return Vec::load(lanes) + Vec::set(float(s.queries[lane] + offset));
  }
  for (int64_t i = 0; i < Vec::kLanes; ++i) {
    const int64_t last = s.queries.count - 1, query = lane + i < last ? lane + i : last;
    lanes[i] = float(s.queries[query] + offset);
  }
  return Vec::load(lanes);
}

// From products to scores before masks, where they stand: of `rows` keys from `row` on and some
// registers of queries from `column` on, into whose maxima they are taken.
class ScoreShape {
 public:
  // Products times `unit` are exponents of `base`, or of e where it is not given.
  ScoreShape(const Scores& s, const Block& block, float unit, float* maximum, Base base = Base::kE)
      : scores_(s),
        block_(block),
        maximum_(maximum),
        // What a cap bends is a number, and so is what a table has; slopes in extreme units might
        // be none.
        factor_(s.p.softcap > 0.0f || s.p.positions.data || !ordinary(s.p.scale) ? unit : 1.0f),
        unit_(unit / factor_),
        cap_(s.p.softcap > 0.0f ? s.p.softcap * exponents_per_e(base) : 1.0f),
        slope_(s.p.alibi.data ? s.p.alibi.at(s.b, s.h) * exponents_per_e(base) / unit_ : 0.0f) {}

  // Of what is left.
  float unit() const { return unit_; }

  // Stores sums of so many keys and registers of queries, shaped, and takes maxima.
  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    const Attention& p = scores_.p;
    if (p.softcap <= 0.0f && !p.alibi.data) {
      add_table(row, column, sum);
    } else if (p.softcap <= 0.0f && !p.positions.data && factor_ == 1.0f) {
      add_slope(row, column, sum);
    } else {
      Store{scores_.data, scores_.columns}(row, column, sum);
      apply(row, R, column, N);
    }
  }

  void apply(int64_t row, int64_t rows, int64_t column, int64_t vectors) const {
    const bool biased = scores_.p.alibi.data || scores_.p.positions.data;
    const bool narrow = narrow_products(scores_.p);
    if (scores_.p.softcap <= 0.0f) {
      run<Cap::kNone, true, false>(row, rows, column, vectors);
    } else if (biased || scores_.derivative) {
      narrow ? run<Cap::kNarrow, true, true>(row, rows, column, vectors)
             : run<Cap::kFull, true, true>(row, rows, column, vectors);
    } else {
      narrow ? run<Cap::kNarrow, false, false>(row, rows, column, vectors)
             : run<Cap::kFull, false, false>(row, rows, column, vectors);
    }
  }

 private:
  enum class Cap { kNone, kNarrow, kFull };

  // What a table adds, while sums are in registers: attention of 2,048 tokens takes 0.96 times as
  // long as where `apply` reads them again.
  template <int R, int N>
  void add_table(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    const Vec factor = Vec::set(factor_);
    Vec largest[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) largest[n] = Vec::load(maximum_ + column + n * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const PositionBias& table = scores_.p.positions;
      const float* added = table.at(scores_.h, scores_.queries[0] + column, block_[row + r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const int64_t lane = n * Vec::kLanes;
        const Vec score = Vec::fma(sum[r][n], factor, Vec::load(added + lane));
        score.store(scores_.data + (row + r) * scores_.columns + column + lane);
        largest[n] = Vec::max(score, largest[n]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) largest[n].store(maximum_ + column + n * Vec::kLanes);
  }

  // What slopes take off, likewise.
  template <int R, int N>
  void add_slope(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    const Vec slope = Vec::set(-slope_);
    Vec largest[N], place[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int64_t lane = column + n * Vec::kLanes;
      largest[n] = Vec::load(maximum_ + lane);
      place[n] = distances(scores_, lane, 0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec key = Vec::set(float(block_[row + r]));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Vec score = Vec::fma(Vec::abs(place[n] - key), slope, sum[r][n]);
        score.store(scores_.data + (row + r) * scores_.columns + column + n * Vec::kLanes);
        largest[n] = Vec::max(score, largest[n]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) largest[n].store(maximum_ + column + n * Vec::kLanes);
  }

  // `kBiased`: there may be slopes or a table. `kDerives`: the derivative may be wanted.
  template <Cap kCap, bool kBiased, bool kDerives>
  void run(int64_t row, int64_t rows, int64_t column, int64_t vectors) const {
    const SoftCap cap = cap_;
    const Vec factor = Vec::set(factor_), slope = Vec::set(-slope_), one = Vec::set(1.0f);
    const int64_t columns = scores_.columns;
    const PositionBias& table = scores_.p.positions;
    const bool adjacent = block_.adjacent(), sloped = scores_.p.alibi.data;
    for (int64_t n = 0; n < vectors; ++n) {
      const int64_t lane = column + n * Vec::kLanes;
      Vec largest = Vec::load(maximum_ + lane), distance = Vec::zero();
      if (kBiased && sloped) distance = distances(scores_, lane, block_[row]);
      for (int64_t r = row; r < row + rows; ++r) {
        float* at = scores_.data + r * columns + lane;
        Vec score = Vec::load(at) * factor;
        if (kDerives && scores_.derivative)
          cap.derivative(score).store(scores_.derivative + r * columns + lane);
        if (kCap == Cap::kNarrow) score = cap.narrow(score);
        if (kCap == Cap::kFull) score = cap(score);
        if (kBiased && table.data)
          score = score + Vec::load(table.at(scores_.h, scores_.queries[0] + lane, block_[r]));
        if (kBiased && sloped) {
          score = Vec::fma(Vec::abs(distance), slope, score);
          if (adjacent) {
            distance = distance - one;
          } else if (r + 1 < row + rows) {
            distance = distance - Vec::set(float(block_[r + 1] - block_[r]));
          }
        }
        score.store(at);
        largest = Vec::max(score, largest);
      }
      largest.store(maximum_ + lane);
    }
  }

  const Scores& scores_;
  const Block& block_;
  float* maximum_;
  float factor_, unit_;
  SoftCap cap_;
  float slope_;
};

// The same of a row: a query's scores, in natural exponents.
inline void shape_row(const Scores& s, const Block& block) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Attention& p = s.p;
  const bool caps = p.softcap > 0.0f;
  const SoftCap cap(caps ? p.softcap : 1.0f);
  const Vec slope = Vec::set(p.alibi.data ? -p.alibi.at(s.b, s.h) : 0.0f);
  const int64_t place = s.queries[0] + p.diagonal;
  for (int64_t j = 0; j < block.count; j += kLanes) {
    const int64_t some = block.count - j < kLanes ? block.count - j : kLanes;
    Vec score = Vec::load(s.data + j, some);
    if (caps && s.derivative) cap.derivative(score).store(s.derivative + j, some);
    if (caps) score = cap(score);
    if (p.alibi.data) {
      float lanes[kLanes] = {};
      for (int64_t i = 0; i < some; ++i) lanes[i] = float(place - block[j + i]);
      score = Vec::fma(Vec::abs(Vec::load(lanes)), slope, score);
    }
    if (p.positions.data) {
      float lanes[kLanes] = {};
      for (int64_t i = 0; i < some; ++i)
        lanes[i] = *p.positions.at(s.h, s.queries[0], block[j + i]);
      score = score + Vec::load(lanes);
    }
    score.store(s.data + j, some);
  }
}

// Gradients of `count` scores become those of the products.
inline void through_cap(const float* derivative, int64_t count, float* grads) {
  for (int64_t i = 0; i < count; ++i) grads[i] *= derivative[i];
}

}  // namespace
}  // namespace ff
