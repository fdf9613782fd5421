// Masks of scores: which of them a mask and the ranges of queries hide, and what a mask adds.
// The last part of the score policy (scores.h), and the policy as a whole: make_scores.
#pragma once

#include "cpu/gemm/convert.h"
#include "scores.h"

namespace ff {
namespace {

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

// The queries that see a key, of `count` from the `first` on, as bits.
inline uint16_t lanes_that_see(const Scores& s, int64_t first, int64_t count, int64_t key) {
  const Attention& p = s.p;
  if (!p.ranges.first && s.queries.adjacent()) {
    const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1; };
    const int64_t from = key - p.diagonal - p.right, last = key - p.diagonal + p.left;
    const int64_t query = s.queries[first];
    return uint16_t(below(last + 1 - query) & ~below(from - query));
  }
  uint32_t lanes = 0;
  if (p.ranges.first && s.queries.adjacent()) {
    const int64_t row = s.b * p.q_len + s.queries[first];
    const int32_t *from = p.ranges.first + row, *end = p.ranges.end + row, j = int32_t(key);
    for (int64_t i = 0; i < count; ++i) lanes |= uint32_t((from[i] <= j) & (j < end[i])) << i;
    if (!p.ranges.scattered[s.b]) return uint16_t(lanes);
    const int32_t* numbers = p.ranges.q_segments + row;
    const int32_t own = p.ranges.k_segments[s.b * p.kv_len + key];
    uint32_t same = 0;
    for (int64_t i = 0; i < count; ++i) same |= uint32_t(numbers[i] == own) << i;
    return uint16_t(lanes & same);
  }
  for (int64_t i = 0; i < count; ++i)
    lanes |= uint32_t(sees(p, s.b, s.queries[first + i], key)) << i;
  return uint16_t(lanes);
}

// Multiplies by `unit`, adds the mask, puts -inf where it, or if `kHides` the range of its query
// hides a score, and takes the maximum of every query.
template <bool kHides>
inline void mask_scores(const Scores& s, const Block& block, float unit, float* maximum) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Attention& p = s.p;
  const bool logical = p.mask_type == Type::kBool;
  const bool transposed = p.mask.column == 1 && p.mask.row != 0 && block.adjacent();
  const bool by_bits = p.mask.data && logical && transposed;
  const Vec hidden = Vec::set(-kInfinity), scale = Vec::set(unit);
  const int64_t head = s.b * p.mask.batch + s.h * p.mask.head;
  for (int64_t lane = 0; lane < s.columns; lane += kLanes) {
    const int64_t left = s.queries.count - lane, some = left < kLanes ? left : kLanes;
    const KeyRange all = kHides ? keys_seen_by_all(s, lane, some) : KeyRange{0, p.kv_len};
    Vec largest = hidden;
    for (int64_t first = 0; first < block.count; first += kLanes) {
      const int64_t count = block.count - first < kLanes ? block.count - first : kLanes;
      Vec bias[kLanes];
      uint32_t truths[kLanes] = {};
      if (by_bits) {
        const Bool* mask = static_cast<const Bool*>(p.mask.data) + head + block[first];
        for (int64_t i = 0; i < some; ++i)
          truths[i] = Vec::truths(mask + s.queries[lane + i] * p.mask.row, count);
      } else if (p.mask.data && transposed) {
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
        if (kHides && (block[first + k] < all.first || block[first + k] >= all.end))
          score = Vec::select(lanes_that_see(s, lane, some, block[first + k]), score, hidden);
        score.store(at);
        largest = Vec::max(score, largest);
      }
    }
    largest.store(maximum + lane);
  }
}

inline void mask_scores(const Scores& s, const Block& block, float unit, float* maximum) {
  if (crosses_range(s, block)) {
    mask_scores<true>(s, block, unit, maximum);
  } else {
    mask_scores<false>(s, block, unit, maximum);
  }
}

// Whether a mask can be had as bits before the product: bool, with its keys adjacent in memory and
// the ends of the range elsewhere.
inline bool maskable_product(const Scores& s, const Block& block) {
  const Attention& p = s.p;
  return p.mask.data && p.mask_type == Type::kBool && p.mask.column == 1 && block.adjacent() &&
         !crosses_range(s, block);
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

// Scores of a block: calls product(epilogue) for their products, shapes and masks these, and fills
// `maximum` with the largest of every query. Returns their unit. `shown` is memory for a mask's
// bits, or none: it is then looked at after the product.
template <class Product>
inline float make_scores(const Scores& s, const Block& block, Base base, float unit, float* maximum,
                         uint16_t* shown, const Product& product) {
  for (int64_t e = 0; e < s.columns; ++e) maximum[e] = -kInfinity;
  if (is_shaped(s.p)) {
    const ScoreShape shape(s, block, unit, maximum, base);
    product(shape);
    unit = shape.unit();
  } else if (shown && maskable_product(s, block)) {
    shown_lanes(s, block, shown);
    product(StoreShown{s.data, s.columns, maximum, shown});
    return unit;
  } else {
    product(StoreMaximum{s.data, s.columns, maximum});
  }
  if (!s.p.mask.data && !crosses_range(s, block)) return unit;
  mask_scores(s, block, unit, maximum);
  return 1.0f;
}

// The same of products that stand there already, as natural exponents.
inline void make_scores_in_place(const Scores& s, const Block& block, Base base, float unit,
                                 float* maximum) {
  if (is_shaped(s.p)) {
    const ScoreShape shape(s, block, unit, maximum, base);
    shape.apply(0, block.count, 0, s.columns / Vec::kLanes);
    unit = shape.unit();
  }
  mask_scores(s, block, unit, maximum);
}

// A row of products, in natural exponents: shapes them, adds the mask, and hides what it or the
// range of the query hides.
inline void make_row(const Scores& s, const Block& block) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Attention& p = s.p;
  if (is_shaped(p)) shape_row(s, block);
  const int64_t row = s.b * p.mask.batch + s.h * p.mask.head + s.queries[0] * p.mask.row;
  for (int64_t j = 0; j < block.count && p.mask.data; j += kLanes) {
    const int64_t some = block.count - j < kLanes ? block.count - j : kLanes;
    float lanes[kLanes];
    Vec bias = Vec::zero();
    if (block.adjacent()) {
      bias =
          mask_lanes(p.mask.data, p.mask_type, row + block[j] * p.mask.column, p.mask.column, some);
    } else {
      for (int64_t i = some; i-- > 0;) {
        mask_lanes(p.mask.data, p.mask_type, row + block[j + i] * p.mask.column, 1, 1)
            .store(lanes + i, 1);
      }
      bias = Vec::load(lanes, some);
    }
    const Vec score = Vec::load(s.data + j, some);
    const bool logical = p.mask_type == Type::kBool;
    (logical ? Vec::select(bias, score, Vec::set(-kInfinity)) : score + bias)
        .store(s.data + j, some);
  }
  if (!crosses_range(s, block)) return;
  for (int64_t j = 0; j < block.count; ++j)
    if (!sees(p, s.b, s.queries[0], block[j])) s.data[j] = -kInfinity;
}

}  // namespace
}  // namespace ff
