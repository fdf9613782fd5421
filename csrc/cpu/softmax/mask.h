// The mask rule: which scores a mask and the diagonal hide, and what a mask adds to them. Keys that
// padding hides are left out before (visible_keys in cpu/positions.h).
//
// Scores stand keys down and queries across, unless a function says that it has one query.
#pragma once

#include "cpu/gemm/convert.h"
#include "cpu/positions.h"
#include "exponential.h"

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
  const bool transposed = p.mask.column == 1 && p.mask.row != 0 && block.adjacent();
  const bool by_bits = p.mask.data && logical && transposed;
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

// Adds the mask to a row of scores, and hides what it or the diagonal hides.
inline void mask_row(const Scores& s, const Block& block) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Attention& p = s.p;
  const int64_t row = s.b * p.mask.batch + s.h * p.mask.head + s.queries[0] * p.mask.row;
  for (int64_t j = 0; j < block.count; j += kLanes) {
    const int64_t some = block.count - j < kLanes ? block.count - j : kLanes;
    if (p.mask.data) {
      float lanes[kLanes];
      Vec bias = Vec::zero();
      if (block.adjacent()) {
        bias = mask_lanes(p.mask.data, p.mask_type, row + block[j] * p.mask.column, p.mask.column,
                          some);
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
    const int64_t seen = p.keys_seen_by(s.queries[0]);
    for (int64_t i = 0; i < some && p.causal; ++i)
      if (block[j + i] >= seen) s.data[j + i] = -kInfinity;
  }
}

}  // namespace
}  // namespace ff
