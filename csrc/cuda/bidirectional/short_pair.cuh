// Attention in both directions where both sides of a head fit into shared memory: one block a head
// computes the scores once, in float32, takes maxima and sums along rows and columns, and makes the
// weights of either product from the scores in place.
#pragma once

#include "cuda/softmax.cuh"

namespace ff::cuda {
namespace {

constexpr int kPairWarps = 8;

// Lengths of both sides up to whole tiles.
struct PairPlan {
  int queries, keys;
};

inline PairPlan pair_plan(const Bidirectional& p) {
  return {int(p.q_len + 15) / 16 * 16, int(p.kv_len + 15) / 16 * 16};
}

// Floats from one row of scores to the next: rows in sequence begin eight banks apart.
FF_DEVICE int score_stride(const PairPlan& plan) { return plan.keys + 8; }

inline int64_t pair_bytes(const PairPlan& plan, int dim) {
  const int64_t rows = plan.queries + plan.keys;
  const int64_t operands = 2 * rows * dim * 2, scores = int64_t(plan.queries) * (plan.keys + 8) * 4;
  return operands + scores + rows * (2 * 4 + 1) + 16 * kSharedAlignment;
}

inline int pair_dim(const Bidirectional& p) {
  const int64_t values = p.value_dim > p.query_value_dim ? p.value_dim : p.query_value_dim;
  return padded_dim(p, values);
}

// Whether a call goes this way. A block that has much to do leaves others idle: 64 x 256 at most.
inline bool is_short_pair(const Bidirectional& p, int capability) {
  if (p.q_len * p.kv_len > 64 * 256 || p.q_len * p.kv_len == 0) return false;
  return pair_bytes(pair_plan(p), pair_dim(p)) <= shared_limit(capability);
}

// One side of a head: its positions, and what the softmax over the other side found for each.
struct Side {
  int count;
  bool* hidden;  // from the other side; true beyond the count, too
  float *maximum, *sum;
};

FF_DEVICE Side take_side(Shared& shared, int64_t count, int padded, const Padding& padding) {
  const Side side{int(count), shared.take<bool>(padded), shared.take<float>(padded),
                  shared.take<float>(padded)};
  for (int i = thread_index(); i < padded; i += kPairWarps * 32)
    side.hidden[i] = i >= count || padding.hides(i);
  return side;
}

// A side with what it gathers: score (own i, other j) stands at scores + i * row + j * column.
struct Direction {
  Side own, other;
  int row, column;
};

// Maxima, in the unit of exponents, and sums of the weights: four positions a warp, of eight lanes
// each.
template <bool kNatural>
FF_DEVICE void take_statistics(const Units<kNatural>& units, const float* scores,
                               const Direction& way, int first) {
  const int i = first + lane_index() / 8;
  const float* const from = scores + (i < way.own.count ? i : way.own.count - 1) * way.row;
  float maximum = -kInfinity, sum = 0.0f;
#pragma unroll 2
  for (int j = lane_index() % 8; j < way.other.count; j += 8)
    if (!way.other.hidden[j]) maximum = fmaxf(maximum, from[j * way.column]);
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));
  maximum = units.maximum(maximum);
#pragma unroll 2
  for (int j = lane_index() % 8; j < way.other.count; j += 8)
    if (!way.other.hidden[j]) sum += units.power(from[j * way.column], finite(maximum));
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane_index() % 8 == 0 && i < way.own.count)
    way.own.maximum[i] = maximum, way.own.sum[i] = sum;
}

// Outputs of 16 positions from `first` on, by way of the same rows of `scratch`.
template <class T, int kDim, bool kNatural>
FF_DEVICE void gather(const Units<kNatural>& units, const float* scores, const Direction& way,
                      const SharedTile<T, kDim>& values, const SharedTile<T, kDim>& scratch,
                      int first, const MutableView& to, const MutableLse& lse, int b, int h,
                      int dim) {
  float maximum[2], shift[2], sum[2], out[kDim / 8][4];
  const float* from[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = first + lane_index() / 4 + r * 8, own = i < way.own.count ? i : way.own.count - 1;
    maximum[r] = way.own.maximum[own], sum[r] = way.own.sum[own];
    shift[r] = finite(maximum[r]);
    from[r] = scores + own * way.row;
  }
  store_lses(units, lse, b, h, first, way.own.count, maximum, sum);
  clear(out);
#pragma unroll 1
  for (int j = 0; j < way.other.count; j += 16) {
    float weights[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = j + n * 8 + lane_index() % 4 * 2 + i % 2;
        const float weight = units.power(from[i / 2][at * way.column], shift[i / 2]);
        weights[n][i] = way.other.hidden[at] ? 0.0f : weight;
      }
    uint32_t a[4];
    left_operand<T>(weights[0], weights[1], a);
    add_product(a, value_reader(values, j), 0, out);
  }
  store_means(scratch, first, to, b, h, first, way.own.count, dim, sum, out);
}

// Kernels are bound by the way of their instructions to the SM: what is done for both sides is in
// loops.
template <class T, int kDim, class Scores>
FF_KERNEL(kPairWarps * 32)
bidirectional_short(const BidirectionalForward p, const PairPlan plan) {
  if constexpr (has_mma<T>()) {
    constexpr int kTiles = 8, kThreads = kPairWarps * 32;
    uint32_t index = uint32_t(block_index());
    const int h = take_last(index, p.heads), b = int(index);
    const int stride = score_stride(plan);

    Shared shared;
    const SharedTile<T, kDim> query{shared.take<T>(plan.queries * kDim)};
    const SharedTile<T, kDim> key{shared.take<T>(plan.keys * kDim)};
    const SharedTile<T, kDim> value{shared.take<T>(plan.keys * kDim)};
    const SharedTile<T, kDim> query_value{shared.take<T>(plan.queries * kDim)};
    float* const scores = shared.take<float>(plan.queries * stride);

    // A hidden position has scores for its own output, so that no padding hides them.
    const Exponents<Scores> exponents(p, b, h, p.scale);
    const Padding none(nullptr, 0, 0, 0);
    const Padding query_padding(p.query_padding, p.query_padding_batch, p.query_padding_column, b);
#pragma unroll 1
    for (int operand = 0; operand < 4; ++operand) {  // query, key, value, query value
      const bool keys = operand == 1 || operand == 2, values = operand >= 2;
      const View& view = operand == 0   ? p.query
                         : operand == 1 ? p.key
                         : operand == 2 ? p.value
                                        : p.query_value;
      const int64_t dim = !values ? p.head_dim : keys ? p.value_dim : p.query_value_dim;
      const Head<T> head(view, b, h, keys ? p.kv_len : p.q_len, dim);
      T* const to = operand == 0   ? query.data
                    : operand == 1 ? key.data
                    : operand == 2 ? value.data
                                   : query_value.data;
      Padding padding = none;
      if (values) padding = keys ? exponents.padding : query_padding;
      const int rows = keys ? plan.keys : plan.queries;
#pragma unroll 1
      for (int first = 0; first < rows; first += 64) {
        const uint64_t present = KeyFlags(padding, first, head.count).present();
        const RowCopy<T, kDim> copy(head, first, uint32_t(thread_index()), kThreads);
        copy.template load<false>(SharedTile<T, kDim>{to + first * kDim},
                                  rows - first < 64 ? rows - first : 64, present);
      }
      if (operand % 2 == 1) commit_copies();
    }
    const Side queries = take_side(shared, p.q_len, plan.queries, query_padding);
    const Side keys = take_side(shared, p.kv_len, plan.keys, exponents.padding);
    wait_copies<1>();
    barrier();

    const int spans = (plan.keys + kTiles * 8 - 1) / (kTiles * 8);  // of keys, a warp each
#pragma unroll 1
    for (int unit = warp_index(); unit < plan.queries / 16 * spans; unit += kPairWarps) {
      const int row = unit / spans * 16, first = unit % spans * kTiles * 8;
      const int left = (plan.keys - first) / 8, tiles = left < kTiles ? left : kTiles;
      const uint64_t present = KeyFlags(none, first, exponents.kv_len).present();
      const Hiding<kTiles, Scores> hiding(exponents, row, first);
      float tile[kTiles][4];
      multiply_scores<1>(query, row, key, first, tiles, tile);
      hiding.apply(exponents, row, first, present, tile);
      float* const to = scores + (row + lane_index() / 4) * stride + first + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n < tiles) to[i / 2 * 8 * stride + n * 8 + i % 2] = tile[n][i];
    }
    barrier();
    const auto way = [&](bool of_queries) {
      Direction way{queries, keys, stride, 1};
      if (!of_queries) way = {keys, queries, 1, stride};
      return way;
    };
    const int query_fours = plan.queries / 4, key_fours = plan.keys / 4;
#pragma unroll 1
    for (int unit = warp_index(); unit < query_fours + key_fours; unit += kPairWarps) {
      const bool of_queries = unit < query_fours;
      take_statistics(exponents, scores, way(of_queries),
                      (of_queries ? unit : unit - query_fours) * 4);
    }
    wait_copies<0>();
    barrier();
    const int query_tiles = plan.queries / 16, key_tiles = plan.keys / 16;
#pragma unroll 1
    for (int unit = warp_index(); unit < query_tiles + key_tiles; unit += kPairWarps) {
      const bool of_queries = unit < query_tiles;
      MutableView to = p.out_q;
      MutableLse lse = p.lse_q;
      if (!of_queries) to = p.out_k, lse = p.lse_k;
      gather(exponents, scores, way(of_queries),
             SharedTile<T, kDim>{of_queries ? value.data : query_value.data},
             SharedTile<T, kDim>{of_queries ? query.data : key.data},
             (of_queries ? unit : unit - query_tiles) * 16, to, lse, b, h,
             int(of_queries ? p.value_dim : p.query_value_dim));
    }
  }
}

template <class T>
const char* run_short_pair(const BidirectionalForward& p, void* stream) {
  const PairPlan plan = pair_plan(p);
  const int dim = pair_dim(p);
  const Launch size{p.batch * p.heads, kPairWarps * 32, int(pair_bytes(plan, dim)), stream};
  return with_dim(dim, [&]<int kDim>() {
    return with_scores<kDim>(p, [&]<class Scores>() {
      return launch<bidirectional_short<T, kDim, Scores>>(size, p, plan);
    });
  });
}

}  // namespace
}  // namespace ff::cuda
