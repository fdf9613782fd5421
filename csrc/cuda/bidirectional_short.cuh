// Attention in both directions where both sides of a head fit into shared memory: one block a head
// computes the scores once, in float32, takes maxima and sums along rows and columns, and makes the
// weights of either product from the scores in place.
#pragma once

#include "tile.cuh"

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
  return padded_dim(p.head_dim, values);
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

// Maxima and sums of the weights: of queries by warps with lanes along the keys, of keys by
// threads.
FF_DEVICE void take_statistics(const Exponents& exponents, const float* scores, int stride,
                               const Side& queries, const Side& keys) {
  for (int i = warp_index(); i < queries.count; i += kPairWarps) {
    const float* row = scores + i * stride;
    float maximum = -kInfinity, sum = 0.0f;
    for (int j = lane_index(); j < keys.count; j += 32)
      if (!keys.hidden[j]) maximum = fmaxf(maximum, row[j]);
    for (int mask = 16; mask > 0; mask /= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));
    for (int j = lane_index(); j < keys.count; j += 32)
      if (!keys.hidden[j]) sum += exponents.power(row[j], finite(maximum));
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() == 0) queries.maximum[i] = maximum, queries.sum[i] = sum;
  }
  // From the last warp down: it has the fewest queries.
  for (int j = kPairWarps * 32 - 1 - thread_index(); j < keys.count; j += kPairWarps * 32) {
    float maximum = -kInfinity, sum = 0.0f;
    for (int i = 0; i < queries.count; ++i)
      if (!queries.hidden[i]) maximum = fmaxf(maximum, scores[i * stride + j]);
    for (int i = 0; i < queries.count; ++i)
      if (!queries.hidden[i]) sum += exponents.power(scores[i * stride + j], finite(maximum));
    keys.maximum[j] = maximum, keys.sum[j] = sum;
  }
}

// Outputs of 16 positions from `first` on, of the side `own`, which gathers `values` of the `other`
// one. Score (own i, other j) stands at scores + i * row + j * column.
template <class T, int kDim>
FF_DEVICE void gather(const Exponents& exponents, const float* scores, int row, int column,
                      const Side& own, const Side& other, const Tile<T, kDim>& values, int first,
                      const MutableView& to, const MutableLse& lse, int64_t b, int64_t h, int dim) {
  float maximum[2], sum[2], out[kDim / 8][4];
  int position[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = first + lane_index() / 4 + r * 8;
    position[r] = i < own.count ? i : own.count - 1;
    maximum[r] = finite(own.maximum[position[r]]), sum[r] = own.sum[position[r]];
    if (lane_index() % 4 == 0 && i < own.count)
      store_lse(lse, b, h, i, exponents.log_sum(own.maximum[i], sum[r]));
  }
  clear(out);
  for (int j = 0; j < other.count; j += 16) {
    float weights[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = j + n * 8 + lane_index() % 4 * 2 + i % 2;
        const float* score = scores + position[i / 2] * row + at * column;
        weights[n][i] = other.hidden[at] ? 0.0f : exponents.power(*score, maximum[i / 2]);
      }
    uint32_t a[4];
    left_operand<T>(weights[0], weights[1], a);
    add_product(a, values, j, out);
  }
  store_means<T, kDim>(to, b, h, first, own.count, dim, sum, out);
}

template <class T, int kDim>
FF_KERNEL(kPairWarps * 32)
bidirectional_short(const BidirectionalForward p, const PairPlan plan) {
  if constexpr (has_mma<T>()) {
    constexpr int kTiles = 8, kThreads = kPairWarps * 32;
    uint32_t index = uint32_t(block_index());
    const int h = take_last(index, p.heads), b = int(index);
    const int stride = score_stride(plan);

    Shared shared;
    const Tile<T, kDim> query{shared.take<T>(plan.queries * kDim)};
    const Tile<T, kDim> key{shared.take<T>(plan.keys * kDim)};
    const Tile<T, kDim> value{shared.take<T>(plan.keys * kDim)};
    const Tile<T, kDim> query_value{shared.take<T>(plan.queries * kDim)};
    float* const scores = shared.take<float>(plan.queries * stride);

    // A hidden position has scores for its own output, so that no padding hides them.
    Exponents exponents(p, b, h);
    const Padding none(nullptr, 0, 0, 0), key_padding = exponents.padding;
    const Padding query_padding(p.query_padding, p.query_padding_batch, p.query_padding_column, b);
    exponents.padding = none;
    const auto load = [&](const Tile<T, kDim>& tile, const View& view, const Padding& padding,
                          int64_t count, int64_t dim, int rows) {
      load_rows(tile, Head<T>(view, b, h, count, dim), padding, 0, rows, thread_index(), kThreads);
    };
    load(query, p.query, none, p.q_len, p.head_dim, plan.queries);
    load(key, p.key, none, p.kv_len, p.head_dim, plan.keys);
    commit_copies();
    load(value, p.value, key_padding, p.kv_len, p.value_dim, plan.keys);
    load(query_value, p.query_value, query_padding, p.q_len, p.query_value_dim, plan.queries);
    commit_copies();
    const Side queries = take_side(shared, p.q_len, plan.queries, query_padding);
    const Side keys = take_side(shared, p.kv_len, plan.keys, key_padding);
    wait_copies<1>();
    barrier();

    const int spans = (plan.keys + kTiles * 8 - 1) / (kTiles * 8);  // of keys, a warp each
    for (int unit = warp_index(); unit < plan.queries / 16 * spans; unit += kPairWarps) {
      const int row = unit / spans * 16, first = unit % spans * kTiles * 8;
      const int left = (plan.keys - first) / 8, tiles = left < kTiles ? left : kTiles;
      float tile[kTiles][4];
      multiply_scores(query, row, key, first, tiles, tile);
      exponents.apply(row, first, tile);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n < tiles)
            scores[(row + lane_index() / 4 + i / 2 * 8) * stride + first + n * 8 +
                   lane_index() % 4 * 2 + i % 2] = tile[n][i];
    }
    barrier();
    take_statistics(exponents, scores, stride, queries, keys);
    wait_copies<0>();
    barrier();
    const int query_tiles = plan.queries / 16, key_tiles = plan.keys / 16;
    for (int unit = warp_index(); unit < query_tiles + key_tiles; unit += kPairWarps) {
      if (unit < query_tiles) {
        gather(exponents, scores, stride, 1, queries, keys, value, unit * 16, p.out_q, p.lse_q, b,
               h, int(p.value_dim));
      } else {
        gather(exponents, scores, 1, stride, keys, queries, query_value, (unit - query_tiles) * 16,
               p.out_k, p.lse_k, b, h, int(p.query_value_dim));
      }
    }
  }
}

template <class T>
const char* run_short_pair(const BidirectionalForward& p, void* stream) {
  const PairPlan plan = pair_plan(p);
  const int dim = pair_dim(p);
  const Launch size{p.batch * p.heads, kPairWarps * 32, int(pair_bytes(plan, dim)), stream};
  return with_dim(dim,
                  [&]<int kDim>() { return launch<bidirectional_short<T, kDim>>(size, p, plan); });
}

}  // namespace
}  // namespace ff::cuda
