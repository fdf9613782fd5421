// From products of queries and keys to weights: the score policy of the kernels of 16-bit types.
// What a call does to scores is here, in the order of core/score_policy.py; places are in
// diagonal.h, and the kinds of masks that are numbers in kinds.cuh.
#pragma once

#include "kinds.cuh"
#include "shared_tile.cuh"

namespace ff::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Whether scores are in natural units, and the maximum is subtracted before log2(e) is multiplied
// with: a mask of finfo.min or an extreme scale would overflow, and so would what the largest score
// loses when it is rounded to a shift, from scales of about 2^26 on. Else scores stay raw products,
// and one fma does the rest, with scale * log2(e).
template <class Call>
bool is_natural(const Call& p) {
  return p.mask.data || has_kinds(p) || !(p.scale >= 0x1p-16f && p.scale <= 0x1p16f);
}

// The class of head dims that a call's kernel is made for, of which those with kinds have fewer.
template <class Call>
int padded_dim(const Call& p, int64_t value_dim) {
  const int64_t dim = p.head_dim > value_dim ? p.head_dim : value_dim;
  if (has_kinds(p)) return dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  return dim <= 32 ? 32 : int((dim + 63) / 64 * 64);
}

// Calls body<Scores>() for what a call of this class needs.
template <int kDim, class Body>
const char* with_scores(const Attention& p, const Body& body) {
  if constexpr (kDim != 32 && kDim != 192) {
    if (has_kinds(p)) return body.template operator()<WithKinds>();
  }
  if (is_natural(p)) return body.template operator()<Natural>();
  return body.template operator()<Products>();
}

template <int kDim, class Body>
const char* with_scores(const Float8Forward&, const Body& body) {
  if constexpr (kDim == 32 || kDim == 192) {
    return "keys of 8 bits have no kernel of this class";
  } else {
    return body.template operator()<WithFloat8>();
  }
}

// 0 in place of -inf, the maximum of a row without a key so far: -inf - -inf would be NaN.
FF_DEVICE float finite(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// A weight is 2^(x * factor - shift), or 2^((x - shift) * log2(e)) of natural units. Maxima and
// shifts are in the units that the shift has.
template <bool kNatural>
struct Units {
  float factor;

  FF_DEVICE explicit Units(float scale) : factor(scale * kLog2E) {}
  FF_DEVICE float maximum(float score) const { return kNatural ? score : score * factor; }
  FF_DEVICE float power(float score, float shift) const {
    return kNatural ? exp2((score - shift) * kLog2E) : exp2(fmaf(score, factor, -shift));
  }
  // By what sums are multiplied when a maximum moves to `shift`.
  FF_DEVICE float rescale(float maximum, float shift) const {
    return exp2(kNatural ? (maximum - shift) * kLog2E : maximum - shift);
  }
  // -inf for a row without a key.
  FF_DEVICE float log_sum(float maximum, float sum) const {
    if (sum == 0.0f) return -kInfinity;
    return kNatural ? maximum + log2(sum) * kLn2 : (maximum + log2(sum)) * kLn2;
  }
};

// What hides scores of a head and is added to them. Products with the scale are rounded, as their
// maximum is, so that none exceeds it.
template <class Scores>
struct Exponents : Units<Scores::kNatural> {
  const void* mask;  // of this batch entry and head; without kNatural there is none
  int64_t row, column;
  Type type;
  Padding padding;
  float scale;
  typename Scores::Kinds::Places places;
  typename Scores::Kinds kinds;
  int q_len, kv_len;

  FF_DEVICE Exponents(const Attention& p, int64_t b, int64_t h, float scale)
      : Units<Scores::kNatural>(p.scale),
        mask(Scores::kNatural ? p.mask.data : nullptr),
        row(p.mask.row),
        column(p.mask.column),
        type(p.mask_type),
        padding(p.padding, p.padding_batch, p.padding_column, b),
        scale(scale),
        places(p, b),
        kinds(p, b, h),
        q_len(int(p.q_len)),
        kv_len(int(p.kv_len)) {
    if (mask) {
      const int size = type == Type::kFloat32 ? 4 : type == Type::kBool ? 1 : 2;
      mask = static_cast<const char*>(mask) + (b * p.mask.batch + h * p.mask.head) * size;
    }
  }
};

// What becomes of a lane's scores in 8 kTiles keys: loaded before their product is there, but with
// kinds, for which registers would not do. Scores are those of rows `query` + lane / 4 and 8 on.
template <int kTiles, class Scores>
struct Hiding {
  static_assert(kTiles <= 8);
  static constexpr bool kEarly = Scores::kNatural && !Scores::Kinds::kAny;

  uint32_t shown = ~0u;  // by the mask; bits of scores, see bit()
  float added[kEarly ? kTiles : 1][4];

  // Score i of tile n. Tiles n and n + 4 share a byte, so that no bits of keys have to be moved.
  FF_DEVICE static constexpr uint32_t bit(int n, int i) {
    return 1u << (n % 4 * 8 + n / 4 * 4 + i);
  }

  // Of the keys from `first` on.
  FF_DEVICE Hiding(const Exponents<Scores>& exponents, int query, int first) {
    if constexpr (kEarly) {
      clear(added);
      read_mask(exponents, query, first, shown,
                [&](int n, int i, float entry) { added[n][i] = entry; });
    }
  }

  // Those of the keys are there that are `present`.
  FF_DEVICE void apply(const Exponents<Scores>& exponents, int query, int first, uint64_t present,
                       float (&scores)[kTiles][4]) const {
    const auto& places = exponents.places;
    uint32_t visible = shown;
    if (places.any()) {
      const int lane_query = query + lane_index() / 4;
      visible &= of_lane(present & places.seen(lane_query, first)) |
                 of_lane(present & places.seen(lane_query + 8, first)) << 2;
    } else {
      visible &= of_lane(present) * 5;  // both rows alike
    }
    if constexpr (Scores::Kinds::kAny) {
      const int lane_query = query + lane_index() / 4;
      shape(exponents, lane_query, first, scores);
      read_mask(exponents, query, first, visible,
                [&](int n, int i, float entry) { scores[n][i] += entry; });
      hide_segments(exponents, lane_query, first, visible);
    } else if constexpr (Scores::kNatural) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[n][i] = rounded_product(scores[n][i], exponents.scale) + added[n][i];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(visible & bit(n, i))) scores[n][i] = -kInfinity;
  }

 private:
  // Bits of the first row's scores.
  FF_DEVICE static uint32_t of_lane(uint64_t keys) {
    keys >>= lane_index() % 4 * 2;
    return (uint32_t(keys) & 0x03030303u) | (uint32_t(keys >> 32) & 0x03030303u) << 4;
  }

  // Products to scores before masks.
  FF_DEVICE static void shape(const Exponents<Scores>& exponents, int query, int first,
                              float (&scores)[kTiles][4]) {
    const auto& kinds = exponents.kinds;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = rounded_product(scores[n][i], exponents.scale);
    if (kinds.cap > 0.0f) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[n][i] = kinds.template capped<Cap::kNarrow>(scores[n][i]);
    }
    if (kinds.slope != 0.0f) {
      const int lane_key = first + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          scores[n][i] = kinds.biased(scores[n][i], query + i / 2 * 8, lane_key + n * 8 + i % 2);
    }
    if (kinds.positioned() && exponents.kv_len > 0) {
      const int last_query = exponents.q_len - 1, last_key = exponents.kv_len - 1;
      const int lane_key = first + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = query + i / 2 * 8, key = lane_key + n * 8 + i % 2;
          scores[n][i] +=
              kinds.position(row < last_query ? row : last_query, key < last_key ? key : last_key);
        }
    }
  }

  FF_DEVICE static void hide_segments(const Exponents<Scores>& exponents, int query, int first,
                                      uint32_t& visible) {
    const auto& kinds = exponents.kinds;
    if (!kinds.segmented() || exponents.kv_len == 0) return;
    const int last_query = exponents.q_len - 1, last_key = exponents.kv_len - 1;
    int64_t own[2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
      own[r] = kinds.query_segment(query + r * 8 < last_query ? query + r * 8 : last_query);
    const int lane_key = first + lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = lane_key + n * 8 + e;
        const int64_t segment = kinds.key_segment(key < last_key ? key : last_key);
        if (segment != own[0]) visible &= ~bit(n, e);
        if (segment != own[1]) visible &= ~bit(n, e + 2);
      }
  }

  // Takes the bits of what a bool mask hides off, and hands the entries of a float one on.
  template <class Add>
  FF_DEVICE static void read_mask(const Exponents<Scores>& exponents, int query, int first,
                                  uint32_t& bits, const Add& add) {
    if (!exponents.mask || exponents.kv_len == 0) return;
    const int lane_query = query + lane_index() / 4;
    if (exponents.type == Type::kBool) {
      load<Bool>(exponents, lane_query, first, [&](int n, int i, Bool entry) {
        if (!entry) bits &= ~bit(n, i);
      });
    } else if (exponents.type == Type::kFloat32) {
      load<float>(exponents, lane_query, first, add);
    } else {
      const bool half = exponents.type == Type::kFloat16;
      load<BFloat16>(exponents, lane_query, first, [&](int n, int i, BFloat16 entry) {
        add(n, i, half ? to_float(Half{entry.bits}) : to_float(entry));
      });
    }
  }

  // Gives every score its entry, of a neighbour where there is none: loads without branches.
  template <class E, class Take>
  FF_DEVICE static void load(const Exponents<Scores>& exponents, int query, int first,
                             const Take& take) {
    const auto* const data = static_cast<const E*>(exponents.mask);
    const E* rows[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = query + r * 8 < exponents.q_len ? query + r * 8 : exponents.q_len - 1;
      rows[r] = data + i * exponents.row;
    }
    const int lane_key = first + lane_index() % 4 * 2, last = exponents.kv_len - 1;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = lane_key + n * 8 + e < last ? lane_key + n * 8 + e : last;
        const int64_t at = key * exponents.column;
        take(n, e, rows[0][at]), take(n, e + 2, rows[1][at]);
      }
  }
};

// Makes weights of the scores of 16 keys, two tiles; adds them to sums, and their products with the
// values, that stand so many rows behind the reader's, to out.
template <bool kNatural, class T, int kDim>
FF_DEVICE void add_weighted(const Units<kNatural>& units, const float (&low)[4],
                            const float (&high)[4], const float (&shift)[2],
                            const Reader<T, kDim>& values, int rows, float (&sum)[2],
                            float (&out)[kDim / 8][4]) {
  float weights[2][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[0][i] = units.power(low[i], shift[i / 2]);
    weights[1][i] = units.power(high[i], shift[i / 2]);
    sum[i / 2] += weights[0][i] + weights[1][i];
  }
  uint32_t a[4];
  left_operand<T>(weights[0], weights[1], a);
  add_product(a, values, rows, out);
}

// Log-sum-exps of 16 rows, by two of the lanes that share one: that of the first half, and of the
// second, so that the logarithm is there once.
template <bool kNatural>
FF_DEVICE void store_lses(const Units<kNatural>& units, const MutableLse& lse, int b, int h,
                          int row, int count, const float (&maximum)[2], const float (&sum)[2]) {
  if (!lse.data) return;
  const int r = lane_index() % 4, i = row + lane_index() / 4 + r * 8;
  if (r < 2 && i < count)
    store_lse(lse, b, h, i,
              units.log_sum(r == 0 ? maximum[0] : maximum[1], r == 0 ? sum[0] : sum[1]));
}

}  // namespace
}  // namespace ff::cuda
