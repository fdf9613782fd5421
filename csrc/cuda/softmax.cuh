// From products of queries and keys to weights.
#pragma once

#include "shared_tile.cuh"

namespace ff::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Whether scores are in natural units, and the maximum is subtracted before log2(e) is multiplied
// with: a mask of finfo.min or an extreme scale would overflow, and so would what the largest score
// loses when it is rounded to a shift, from scales of about 2^26 on. Else scores stay raw products,
// and one fma does the rest, with scale * log2(e).
inline bool is_natural(const Attention& p) {
  return p.mask.data || !(p.scale >= 0x1p-16f && p.scale <= 0x1p16f);
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
template <bool kNatural>
struct Exponents : Units<kNatural> {
  const void* mask;  // of this batch entry and head; without kNatural there is none
  int64_t row, column;
  Type type;
  Padding padding;
  float scale;
  Diagonal diagonal;
  int q_len, kv_len;

  FF_DEVICE Exponents(const Attention& p, int64_t b, int64_t h)
      : Units<kNatural>(p.scale),
        mask(kNatural ? p.mask.data : nullptr),
        row(p.mask.row),
        column(p.mask.column),
        type(p.mask_type),
        padding(p.padding, p.padding_batch, p.padding_column, b),
        scale(p.scale),
        diagonal(p),
        q_len(int(p.q_len)),
        kv_len(int(p.kv_len)) {
    if (mask) {
      const int size = type == Type::kFloat32 ? 4 : type == Type::kBool ? 1 : 2;
      mask = static_cast<const char*>(mask) + (b * p.mask.batch + h * p.mask.head) * size;
    }
  }
};

// What becomes of a lane's scores in 8 kTiles keys: loaded before their product is there. Scores
// are those of rows `query` + lane / 4 and 8 on.
template <int kTiles, bool kNatural>
struct Hiding {
  static_assert(kTiles <= 8);

  uint32_t shown = ~0u;  // by the mask; bits of scores, see bit()
  float added[kNatural ? kTiles : 1][4];

  // Score i of tile n. Tiles n and n + 4 share a byte, so that no bits of keys have to be moved.
  FF_DEVICE static constexpr uint32_t bit(int n, int i) {
    return 1u << (n % 4 * 8 + n / 4 * 4 + i);
  }

  // Of the keys from `first` on.
  FF_DEVICE Hiding(const Exponents<kNatural>& exponents, int query, int first) {
    if constexpr (kNatural) {
      clear(added);
      if (!exponents.mask || exponents.kv_len == 0) return;
      const int lane_query = query + lane_index() / 4;
      if (exponents.type == Type::kBool) {
        load<Bool>(exponents, lane_query, first, [&](int n, int i, Bool entry) {
          if (!entry) shown &= ~bit(n, i);
        });
      } else if (exponents.type == Type::kFloat32) {
        load<float>(exponents, lane_query, first,
                    [&](int n, int i, float entry) { added[n][i] = entry; });
      } else {
        const bool half = exponents.type == Type::kFloat16;
        load<BFloat16>(exponents, lane_query, first, [&](int n, int i, BFloat16 entry) {
          added[n][i] = half ? to_float(Half{entry.bits}) : to_float(entry);
        });
      }
    }
  }

  // Those of the keys are there that are `present`.
  FF_DEVICE void apply(const Exponents<kNatural>& exponents, int query, int first, uint64_t present,
                       float (&scores)[kTiles][4]) const {
    const Diagonal& diagonal = exponents.diagonal;
    uint32_t visible = shown;
    if (diagonal.direction != 0) {
      const int lane_query = query + lane_index() / 4;
      visible &= of_lane(present & diagonal.seen(lane_query, first)) |
                 of_lane(present & diagonal.seen(lane_query + 8, first)) << 2;
    } else {
      visible &= of_lane(present) * 5;  // both rows alike
    }
    if constexpr (kNatural) {
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

  // Gives every score its entry, of a neighbour where there is none: loads without branches.
  template <class E, class Take>
  FF_DEVICE void load(const Exponents<kNatural>& exponents, int query, int first,
                      const Take& take) const {
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
