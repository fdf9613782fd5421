// Attention over few keys, or of few queries, for latency: all keys and values of a head, or of a
// chunk of them, are in shared memory at once, loaded in one go. A warp has 16 queries and up to 64
// keys, so that no maximum is ever revised; the warps of other keys tell each other maxima, sums
// and partial outputs. Chunks are put together by a second kernel.
#pragma once

#include <optional>

#include "tile.cuh"

namespace ff::cuda {
namespace {

constexpr int kSlice = 64;      // keys of a warp
constexpr int kMostSlices = 8;  // warps that share queries
constexpr int kMostTiles = 4;   // of 16 queries in a block, where warps share none

struct ShortPlan {
  int slices, keys;   // slices of so many keys, a multiple of 16
  int tiles;          // of 16 queries in a block
  int64_t groups;     // of tiles in a head
  int64_t chunks;     // that the keys of a head are cut into
  float* outs;        // (B, H, chunks, Lq, Dv) sums of weighted values, where there are several
  float* statistics;  // (B, H, chunks, Lq, 2) maxima and sums
};

inline int short_bytes(const ShortPlan& plan, int dim) {
  const int queries = shared_bytes<uint16_t>(plan.tiles * 16 * dim);
  const int keys = shared_bytes<uint16_t>(plan.slices * plan.keys * dim);
  const int statistics = shared_bytes<float>(plan.tiles * plan.slices * 16);
  return queries + 2 * keys + 2 * statistics;
}

// How a call goes this way, if it does: a matter of one sequence's lengths and the device alone.
inline std::optional<ShortPlan> short_plan(const Attention& p, int capability) {
  if (p.q_len > 64 && p.kv_len > kSlice) return std::nullopt;
  ShortPlan plan{1, kSlice, 1, 0, 1, nullptr, nullptr};
  const int dim = padded_dim(p.head_dim, p.value_dim);
  const auto fits = [&] { return short_bytes(plan, dim) <= shared_limit(capability); };
  const int64_t tiles = p.q_len > 0 ? (p.q_len + 15) / 16 : 1,
                slices = (p.kv_len + kSlice - 1) / kSlice;
  if (slices <= 1) {
    plan.keys = p.kv_len == 0 ? 16 : int(p.kv_len + 15) / 16 * 16;
    plan.tiles = int(tiles < kMostTiles ? tiles : kMostTiles);
    while (plan.tiles > 1 && !fits()) --plan.tiles;
  } else {
    plan.slices = int(slices < kMostSlices ? slices : kMostSlices);
    while (plan.slices > 1 && !fits()) --plan.slices;
    constexpr int kChunk = kMostSlices / 2;  // longer ones would leave too few blocks
    if (plan.slices < slices && plan.slices > kChunk) plan.slices = kChunk;
    plan.chunks = (slices + plan.slices - 1) / plan.slices;
  }
  plan.groups = (tiles + plan.tiles - 1) / plan.tiles;
  return fits() ? std::optional(plan) : std::nullopt;
}

// Floats of the workspace.
inline int64_t short_workspace(const Attention& p, const ShortPlan& plan) {
  const int64_t rows = p.batch * p.heads * plan.chunks * p.q_len;
  return plan.chunks == 1 ? 0 : rows * (p.value_dim + 2);
}

// Where the results of a chunk's rows stand.
FF_DEVICE int64_t chunk_row(const Attention& p, const ShortPlan& plan, int64_t head, int64_t chunk,
                            int64_t i) {
  return (head * plan.chunks + chunk) * p.q_len + i;
}

// Sums of a warp's rows, those of 8 columns whose bit is set in `own`: to the output, or to the
// workspace.
template <class T, int kDim>
FF_DEVICE void store_rows(const AttentionForward& p, const ShortPlan& plan,
                          const Exponents& exponents, int b, int h, int chunk, int query,
                          uint32_t own, const float (&maximum)[2], const float (&sum)[2],
                          const float (&out)[kDim / 8][4]) {
  const int64_t head = b * p.heads + h;
  const int column = lane_index() % 4 * 2, dim = int(p.value_dim);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = query + lane_index() / 4 + r * 8;
    if (i >= p.q_len) continue;
    const float factor = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
    if (plan.chunks == 1) {
      T* row = output_row<T>(p.out, b, h, i);
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
        if (own >> d & 1)
          store_pair(row, d * 8 + column, dim, out[d][2 * r] * factor, out[d][2 * r + 1] * factor);
      if (column == 0 && (own & 1))
        store_lse(p.lse, b, h, i, exponents.log_sum(maximum[r], sum[r]));
      continue;
    }
    const int64_t at = chunk_row(p, plan, head, chunk, i);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if ((own >> d & 1) && d * 8 + column + e < dim)
          plan.outs[at * dim + d * 8 + column + e] = out[d][2 * r + e];
    if (column == 0 && (own & 1)) {
      plan.statistics[2 * at] = maximum[r];
      plan.statistics[2 * at + 1] = sum[r];
    }
  }
}

template <class T, int kDim>
FF_KERNEL(kMostSlices * 32)
attention_short(const AttentionForward p, const ShortPlan plan) {
  if constexpr (has_mma<T>()) {
    constexpr int kTiles = kSlice / 8;
    uint32_t index = uint32_t(block_index());
    const int first_query = take_last(index, plan.groups) * plan.tiles * 16;
    const int chunk = take_last(index, plan.chunks), h = take_last(index, p.heads), b = int(index);
    const int keys = plan.slices * plan.keys, first_key = chunk * keys;
    const int kv_head = kv_head_of(p, h);

    Shared shared;
    const Tile<T, kDim> query{shared.take<T>(plan.tiles * 16 * kDim)};
    const Tile<T, kDim> key{shared.take<T>(keys * kDim)}, value{shared.take<T>(keys * kDim)};
    float* const maxima = shared.take<float>(plan.tiles * plan.slices * 16);
    float* const sums = shared.take<float>(plan.tiles * plan.slices * 16);

    const Exponents exponents(p, b, h);
    const Padding none(nullptr, 0, 0, 0);
    const int thread = thread_index(), threads = plan.slices * plan.tiles * 32;
    load_rows(query, Head<T>(p.query, b, h, p.q_len, p.head_dim), none, first_query,
              plan.tiles * 16, thread, threads);
    load_rows(key, Head<T>(p.key, b, kv_head, p.kv_len, p.head_dim), none, first_key, keys, thread,
              threads);
    commit_copies();
    load_rows(value, Head<T>(p.value, b, kv_head, p.kv_len, p.value_dim), exponents.padding,
              first_key, keys, thread, threads);
    commit_copies();

    const int slice = warp_index() % plan.slices, tile = warp_index() / plan.slices;
    const int tiles = plan.keys / 8, place = (tile * plan.slices + slice) * 16 + lane_index() / 4;
    const int row = first_query + tile * 16;
    wait_copies<1>();
    barrier();
    float weights[kTiles][4];
    multiply_scores(query, tile * 16, key, slice * plan.keys, tiles, weights);
    exponents.apply(row, first_key + slice * plan.keys, weights);

    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n < tiles) maximum[i / 2] = fmaxf(maximum[i / 2], weights[n][i]);
    maximum[0] = row_maximum(maximum[0]), maximum[1] = row_maximum(maximum[1]);
    if (plan.slices > 1) {
      if (lane_index() % 4 == 0) maxima[place] = maximum[0], maxima[place + 8] = maximum[1];
      barrier();
      for (int s = 0; s < plan.slices; ++s) {
        const int other = place + (s - slice) * 16;
        maximum[0] = fmaxf(maximum[0], maxima[other]);
        maximum[1] = fmaxf(maximum[1], maxima[other + 8]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n >= tiles) continue;
        weights[n][i] = exponents.power(weights[n][i], finite(maximum[i / 2]));
        sum[i / 2] += weights[n][i];
      }
    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);

    wait_copies<0>();
    barrier();  // values are there, and nobody reads keys any more
    float out[kDim / 8][4];
    clear(out);
    add_values(weights, tiles, value, slice * plan.keys, out);
    uint32_t own = ~0u;
    if (plan.slices > 1) {
      // Partial outputs, 16 rows of float32 a warp, where the keys were: 64 rows of 16 bits. Of
      // their sum every warp makes a part.
      constexpr int kStride = kDim + 8;
      float* const parts = reinterpret_cast<float*>(key.data);
      const int column = lane_index() % 4 * 2;
      if (lane_index() % 4 == 0) sums[place] = sum[0], sums[place + 8] = sum[1];
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          parts[(place + i / 2 * 8) * kStride + d * 8 + column + i % 2] = out[d][i];
      barrier();
      sum[0] = sum[1] = 0.0f;
      clear(out);
      own = 0;
      for (int d = slice; d < kDim / 8; d += plan.slices) own |= 1u << d;
      for (int s = 0; s < plan.slices; ++s) {
        const int other = place + (s - slice) * 16;
        sum[0] += sums[other], sum[1] += sums[other + 8];
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (own >> d & 1)
              out[d][i] += parts[(other + i / 2 * 8) * kStride + d * 8 + column + i % 2];
      }
    }
    store_rows<T, kDim>(p, plan, exponents, b, h, chunk, row, own, maximum, sum, out);
  }
}

constexpr int kCombined = 4;  // rows of a block, a warp each

// Rows of all chunks to the output, in order:
//     w_c = 2^(m_c - max m)      out = sum_c w_c out_c / sum_c w_c l_c
template <class T>
FF_KERNEL(kCombined * 32)
combine_chunks(const AttentionForward p, const ShortPlan plan) {
  const int64_t row_index = block_index() * kCombined + warp_index();
  if (row_index >= p.batch * p.heads * p.q_len) return;
  uint32_t index = uint32_t(row_index);
  const int i = take_last(index, p.q_len);
  const int64_t head = index;
  const int h = take_last(index, p.heads), b = int(index);
  const Exponents exponents(p, b, h);
  float maximum = -kInfinity, sum = 0.0f;
  for (int64_t c = 0; c < plan.chunks; ++c)
    maximum = fmaxf(maximum, plan.statistics[2 * chunk_row(p, plan, head, c, i)]);
  T* const row = output_row<T>(p.out, b, h, i);
  for (int64_t c = 0; c < plan.chunks; ++c) {
    const float* of = plan.statistics + 2 * chunk_row(p, plan, head, c, i);
    sum += exponents.power(of[0], finite(maximum)) * of[1];
  }
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int d = lane_index(); d < p.value_dim; d += 32) {
    float out = 0.0f;
    for (int64_t c = 0; c < plan.chunks; ++c) {
      const int64_t at = chunk_row(p, plan, head, c, i);
      out += exponents.power(plan.statistics[2 * at], finite(maximum)) *
             plan.outs[at * p.value_dim + d];
    }
    row[d] = from_float<T>(out * factor);
  }
  if (lane_index() == 0) store_lse(p.lse, b, h, i, exponents.log_sum(maximum, sum));
}

template <class T>
const char* run_short(const AttentionForward& p, ShortPlan plan, void* workspace, void* stream) {
  const int64_t heads = p.batch * p.heads;
  if (heads * p.q_len > 0xffffffff) return "more than 2^32 queries";
  plan.outs = static_cast<float*>(workspace);
  plan.statistics = plan.outs + heads * plan.chunks * p.q_len * p.value_dim;
  const char* error = with_dim(padded_dim(p.head_dim, p.value_dim), [&]<int kDim>() {
    const Launch size{heads * plan.chunks * plan.groups, plan.slices * plan.tiles * 32,
                      short_bytes(plan, kDim), stream};
    return launch<attention_short<T, kDim>>(size, p, plan);
  });
  if (error || plan.chunks == 1) return error;
  const int64_t blocks = (heads * p.q_len + kCombined - 1) / kCombined;
  return launch<combine_chunks<T>>({blocks, kCombined * 32, 0, stream}, p, plan);
}

}  // namespace
}  // namespace ff::cuda
