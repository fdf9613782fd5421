// Attention over tiles of keys that a block walks with an online softmax (FlashAttention-2, Dao
// 2023): a warp has 16 queries and all keys of a tile; keys and values of the next tile are copied
// while this one is computed, where shared memory holds two.
#pragma once

#include "tile.cuh"

namespace ff::cuda {
namespace {

struct TilePlan {
  int stages;      // tiles in shared memory, 1 or 2
  int64_t groups;  // of queries in a head, a block each
};

template <int kDim, int kWarps, int kKeys>
constexpr int tile_bytes(int stages) {
  return shared_bytes<uint16_t>(kWarps * 16 * kDim) +
         2 * shared_bytes<uint16_t>(stages * kKeys * kDim) + shared_bytes<int>(2 * kWarps);
}

// The keys that a block has to look at: those that the diagonal leaves, and of these from the first
// to the last that is not hidden.
struct KeyRange {
  int begin, end;
};

template <int kWarps>
FF_DEVICE KeyRange visible_range(const Exponents& exponents, int first_query, int* scratch) {
  int begin = 0, end = exponents.kv_len;
  exponents.diagonal.limit(first_query, kWarps * 16, begin, end);
  if (!exponents.padding.data) return {begin, end};
  int first = end, last = 0;
  for (int i = begin + thread_index(); i < end; i += kWarps * 32) {
    if (exponents.padding.hides(i)) continue;
    first = i < first ? i : first;
    last = i + 1;
  }
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other_first = shuffle_xor(first, mask), other_last = shuffle_xor(last, mask);
    first = other_first < first ? other_first : first;
    last = other_last > last ? other_last : last;
  }
  if (lane_index() == 0) scratch[warp_index()] = first, scratch[kWarps + warp_index()] = last;
  barrier();
  for (int w = 0; w < kWarps; ++w) {
    first = scratch[w] < first ? scratch[w] : first;
    last = scratch[kWarps + w] > last ? scratch[kWarps + w] : last;
  }
  return {first, last};
}

// Whether a kernel is used on FF_ARCH: below sm_80 weights of 32 keys would spill beside outputs of
// 256 columns.
template <class T, int kDim, int kKeys>
constexpr bool has_tile() {
  return has_mma<T>() && (FF_ARCH >= 80 || kDim < 256 || kKeys < 32);
}

template <class T, int kDim, int kWarps, int kKeys>
FF_KERNEL(kWarps * 32)
attention_tile(const AttentionForward p, const TilePlan plan) {
  if constexpr (has_tile<T, kDim, kKeys>()) {
    constexpr int kThreads = kWarps * 32;
    uint32_t index = uint32_t(block_index());
    const int first_query = take_last(index, plan.groups) * kWarps * 16;
    const int h = take_last(index, p.heads), b = int(index), kv_head = kv_head_of(p, h);

    Shared shared;
    const Tile<T, kDim> query{shared.take<T>(kWarps * 16 * kDim)};
    T* const key = shared.take<T>(plan.stages * kKeys * kDim);
    T* const value = shared.take<T>(plan.stages * kKeys * kDim);
    int* const scratch = shared.take<int>(2 * kWarps);

    const Exponents exponents(p, b, h);
    const Padding none(nullptr, 0, 0, 0);
    const Head<T> keys(p.key, b, kv_head, p.kv_len, p.head_dim);
    const Head<T> values(p.value, b, kv_head, p.kv_len, p.value_dim);
    const auto stage = [&](T* tiles, int tile) {
      return Tile<T, kDim>{tiles + (tile & (plan.stages - 1)) * kKeys * kDim};
    };
    const auto load = [&](int tile) {
      load_rows<true>(stage(key, tile), keys, none, tile * kKeys, kKeys, thread_index(), kThreads);
      load_rows<true>(stage(value, tile), values, exponents.padding, tile * kKeys, kKeys,
                      thread_index(), kThreads);
      commit_copies();
    };

    load_rows<true>(query, Head<T>(p.query, b, h, p.q_len, p.head_dim), none, first_query,
                    kWarps * 16, thread_index(), kThreads);
    const KeyRange range = visible_range<kWarps>(exponents, first_query, scratch);
    const int first_tile = range.begin / kKeys, end_tile = (range.end + kKeys - 1) / kKeys;
    if (first_tile < end_tile) {
      load(first_tile);
    } else {  // the queries are on their way
      commit_copies();
      wait_copies<0>();
    }

    const int row = first_query + warp_index() * 16;
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    float out[kDim / 8][4];
    clear(out);
    for (int tile = first_tile; tile < end_tile; ++tile) {
      if (plan.stages == 2 && tile + 1 < end_tile) {
        load(tile + 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      barrier();
      float weights[kKeys / 8][4];
      multiply_scores(query, warp_index() * 16, stage(key, tile), 0, kKeys / 8, weights);
      exponents.apply(row, tile * kKeys, weights);

      float now[2] = {maximum[0], maximum[1]};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) now[i / 2] = fmaxf(now[i / 2], weights[n][i]);
      float rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        now[r] = row_maximum(now[r]);
        rescale[r] = exponents.power(maximum[r], finite(now[r]));
        maximum[r] = now[r];
        sum[r] *= rescale[r];
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[n][i] = exponents.power(weights[n][i], finite(now[i / 2]));
          sum[i / 2] += weights[n][i];
        }
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[d][i] *= rescale[i / 2];
      add_values(weights, kKeys / 8, stage(value, tile), 0, out);
      barrier();  // nobody reads this stage any more
      if (plan.stages == 1 && tile + 1 < end_tile) load(tile + 1);
    }

    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
    store_means<T, kDim>(p.out, b, h, row, int(p.q_len), int(p.value_dim), sum, out);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row + lane_index() / 4 + r * 8;
      if (lane_index() % 4 == 0 && i < p.q_len)
        store_lse(p.lse, b, h, i, exponents.log_sum(maximum[r], sum[r]));
    }
  }
}

template <class T, int kDim, int kWarps, int kKeys>
const char* launch_tile(const AttentionForward& p, int capability, void* stream) {
  const auto bytes = tile_bytes<kDim, kWarps, kKeys>;
  const int stages = bytes(2) <= shared_limit(capability) ? 2 : 1;
  const TilePlan plan{stages, (p.q_len + kWarps * 16 - 1) / (kWarps * 16)};
  const Launch size{p.batch * p.heads * plan.groups, kWarps * 32, bytes(stages), stream};
  return launch<attention_tile<T, kDim, kWarps, kKeys>>(size, p, plan);
}

// 128 queries a block where a head has many and their outputs leave registers for it.
inline bool takes_wide_tiles(const Attention& p, int capability) {
  return capability >= 80 && p.q_len >= 512 && padded_dim(p.head_dim, p.value_dim) <= 128;
}

template <class T>
const char* run_tiles(const AttentionForward& p, int capability, void* stream) {
  return with_dim(padded_dim(p.head_dim, p.value_dim), [&]<int kDim>() {
    if constexpr (kDim <= 128) {
      const auto wide = launch_tile<T, kDim, 8, 64>, narrow = launch_tile<T, kDim, 4, 64>;
      return (takes_wide_tiles(p, capability) ? wide : narrow)(p, capability, stream);
    } else if constexpr (kDim == 256) {
      const auto older = launch_tile<T, kDim, 4, 16>, newer = launch_tile<T, kDim, 4, 32>;
      return (capability < 80 ? older : newer)(p, capability, stream);
    } else {
      return launch_tile<T, kDim, 4, 32>(p, capability, stream);
    }
  });
}

}  // namespace
}  // namespace ff::cuda
