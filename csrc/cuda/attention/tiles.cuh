// Attention over tiles of keys that a block walks with an online softmax (FlashAttention-2, Dao
// 2023): a warp has 16 queries and all keys of a tile; keys and values of the next tile are copied
// while this one is computed, where shared memory holds two.
#pragma once

#include <type_traits>

#include "float8.cuh"

namespace ff::cuda {
namespace {

struct TilePlan {
  int stages;      // tiles in shared memory, 1 or 2
  int64_t groups;  // of queries in a head, a block each
};

template <int kDim, int kWarps, int kKeys>
constexpr int tile_bytes(int stages) {
  return shared_bytes<uint16_t>(kWarps * 16 * kDim) +
         2 * shared_bytes<uint16_t>(stages * kKeys * kDim) + shared_bytes<int>(2 * kWarps + 6);
}

// Whether every device has room for two: then code and registers for one are spared.
template <int kDim, int kWarps, int kKeys>
constexpr bool has_two_stages() {
  return tile_bytes<kDim, kWarps, kKeys>(2) <= 64 << 10;
}

// The keys that a block has to look at: those that places leave, and of these from the first to the
// last that is not hidden and of a segment between those of its queries.
struct KeyRange {
  int begin, end;
};

template <int kWarps, class Scores>
FF_DEVICE KeyRange visible_range(const Exponents<Scores>& exponents, int first_query,
                                 int* scratch) {
  const Padding& padding = exponents.padding;
  int begin = 0, end = exponents.kv_len;
  exponents.places.limit(first_query, kWarps * 16, begin, end);
  const auto segments = exponents.kinds.segments_of(first_query, kWarps * 16, exponents.q_len);
  if (!padding.data && !segments.exclude()) return {begin, end};
  int first = end, last = 0;
  for (int i = begin + thread_index(); i < end; i += kWarps * 32) {
    if (padding.hides(i)) continue;
    if constexpr (Scores::Kinds::kAny) {
      if (segments.excludes(i)) continue;
    }
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

// Blocks of an SM at once, as far as registers go: 12 or 16 warps hide the latencies of each other.
// Two of 8 warps leave 128 registers, which are enough on sm_90 and 4 to 20 bytes short elsewhere.
template <int kDim, int kWarps, class Scores>
constexpr int blocks_beside() {
  if (kDim > 64 || Scores::kNatural) return 1;
  return kWarps == 4 ? 3 : FF_ARCH == 90 ? 2 : 1;
}

template <class T, int kDim, int kWarps, int kKeys, class Scores>
FF_KERNEL_BESIDE(kWarps * 32, (blocks_beside<kDim, kWarps, Scores>()))
attention_tile(const typename Scores::Call p, const TilePlan plan) {
  if constexpr (has_tile<T, kDim, kKeys>() && (!Scores::kFloat8 || has_float8())) {
    constexpr int kThreads = kWarps * 32, kTiles = kKeys / 8;
    uint32_t index = uint32_t(block_index());
    const int first_query = take_last(index, plan.groups) * kWarps * 16;
    const int h = take_last(index, p.heads), b = int(index), kv_head = kv_head_of(p, h);

    const int stages = has_two_stages<kDim, kWarps, kKeys>() ? 2 : plan.stages;
    Shared shared;
    const SharedTile<T, kDim> query{shared.take<T>(kWarps * 16 * kDim)};
    T* const key = shared.take<T>(stages * kKeys * kDim);
    T* const value = shared.take<T>(stages * kKeys * kDim);
    int* const scratch = shared.take<int>(2 * kWarps + 6);

    const Exponents<Scores> exponents(p, b, h, score_scale<Scores>(p, b, h));
    const auto stage = [&](T* tiles, int tile) {
      return SharedTile<T, kDim>{tiles + (tile & (stages - 1)) * kKeys * kDim};
    };

    const auto thread = uint32_t(thread_index());
    // What 64 columns leave no registers for: which head it is, and the keys that are present.
    int* const kept = scratch + 2 * kWarps;
    if (thread == 0) kept[0] = b, kept[1] = h;
    const auto load_flags = [&](int tile) {
      const Padding padding(p.padding, p.padding_batch, p.padding_column, p.padding ? kept[0] : 0);
      return KeyFlags(padding, tile * kKeys, exponents.kv_len);
    };
    const Head<T> queries(p.query, b, h, p.q_len, p.head_dim);
    RowCopy<T, kDim>(queries, first_query, thread, kThreads)
        .template load<true>(query, kWarps * 16, queries.count - first_query);
    const KeyRange range = visible_range<kWarps>(exponents, first_query, scratch);
    const int first_tile = range.begin / kKeys, end_tile = (range.end + kKeys - 1) / kKeys;
    if (first_tile >= end_tile) {  // the queries are on their way, to where outputs pass
      commit_copies();
      wait_copies<0>();
      barrier();
    }

    const int row = first_query + warp_index() * 16, ahead = stages - 1;
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {};
    if constexpr (Scores::Kinds::kAny) {
      maximum[0] = maximum[1] = exponents.kinds.sink;
      sum[0] = sum[1] = sink_weight(exponents.kinds.sink, lane_index() % 4);
    }
    float out[kDim / 8][4];
    clear(out);
    RowCopy<T, kDim> keys(Head<T>(p.key, b, kv_head, p.kv_len, p.head_dim), first_tile * kKeys,
                          thread, kThreads);
    RowCopy<T, kDim> values(Head<T>(p.value, b, kv_head, p.kv_len, p.value_dim), first_tile * kKeys,
                            thread, kThreads);
    // In one register: bit 0, all rows are whole chunks; bit 1, the first tile is yet to be copied.
    int state = int(keys.chunked && values.chunked) + 2 * ahead;
    // Flags are loaded a tile before its copies want them. All copies are begun in one place, since
    // code that is there twice has to be fetched twice.
    uint64_t coming = load_flags(first_tile).present();
#pragma unroll 1
    for (int tile = first_tile - ahead; tile < end_tile; ++tile) {
      const int next = tile + ahead;
      if (next < end_tile) {
        if (thread == 0) {
          kept[2 + next % 2 * 2] = int(uint32_t(coming));
          kept[3 + next % 2 * 2] = int(uint32_t(coming >> 32));
        }
        const SharedTile<T, kDim> key_stage = stage(key, next), value_stage = stage(value, next);
        if constexpr (Scores::kFloat8) {
          load_float8(p.key, b, kv_head, int(p.head_dim), next * kKeys, key_stage, kKeys, coming,
                      int(thread), kThreads);
          load_float8(p.value, b, kv_head, int(p.value_dim), next * kKeys, value_stage, kKeys,
                      coming, int(thread), kThreads);
        } else if (state & 1) {
          keys.template load_chunks<true>(key_stage, kKeys, coming);
          values.template load_chunks<true>(value_stage, kKeys, coming);
        } else {
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            RowCopy<T, kDim> copy = keys;
            if (i == 1) copy = values;
            copy.template load_plain<true>(i == 0 ? key_stage : value_stage, kKeys, coming);
          }
        }
        keys.move_on(kKeys), values.move_on(kKeys);
      }
      commit_copies();
      const KeyFlags flags = load_flags(next + 1);
      if (state & 2) {
        state &= 1;
        coming = flags.present();
        continue;
      }

      const int first = tile * kKeys;
      const Hiding<kTiles, Scores> hiding(exponents, row, first);
      if (ahead) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      barrier();
      float weights[kTiles][4];
      multiply_scores<4>(query, warp_index() * 16, stage(key, tile), 0, kTiles, weights);
      const uint64_t present =
          uint32_t(kept[2 + tile % 2 * 2]) | uint64_t(uint32_t(kept[3 + tile % 2 * 2])) << 32;
      if (Scores::kNatural || ~present << (64 - kKeys) ||
          exponents.places.crosses(row, 16, first, kKeys))
        hiding.apply(exponents, row, first, present, weights);

      float now[2] = {-kInfinity, -kInfinity}, shift[2];
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) now[i / 2] = fmaxf(now[i / 2], weights[n][i]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        now[r] = fmaxf(maximum[r], exponents.maximum(row_maximum(now[r])));
        shift[r] = finite(now[r]);
      }
      if (ballot(now[0] > maximum[0] || now[1] > maximum[1])) {
        const float rescale[2] = {exponents.rescale(maximum[0], shift[0]),
                                  exponents.rescale(maximum[1], shift[1])};
#pragma unroll
        for (int r = 0; r < 2; ++r) maximum[r] = now[r], sum[r] *= rescale[r];
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
          for (int i = 0; i < 4; ++i) out[d][i] *= rescale[i / 2];
      }
      const Reader<T, kDim> from = value_reader(stage(value, tile), 0);
#pragma unroll
      for (int n = 0; n < kTiles; n += 2)
        add_weighted(exponents, weights[n], weights[n + 1], shift, from, n * 8, sum, out);
      coming = flags.present();
      barrier();  // nobody reads this stage any more
    }

    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
    apply_value_scale<Scores>(p, kept[0], kept[1], out);
    store_means(query, warp_index() * 16, p.out, kept[0], kept[1], row, int(p.q_len),
                int(p.value_dim), sum, out);
    store_lses(exponents, p.lse, kept[0], kept[1], row, int(p.q_len), maximum, sum);
  }
}

template <class T, int kDim, int kWarps, int kKeys, class Call>
const char* launch_tile(const Call& p, int capability, void* stream) {
  const auto bytes = tile_bytes<kDim, kWarps, kKeys>;
  const bool two = has_two_stages<kDim, kWarps, kKeys>() || bytes(2) <= shared_limit(capability);
  const int stages = two ? 2 : 1;
  const TilePlan plan{stages, (p.q_len + kWarps * 16 - 1) / (kWarps * 16)};
  const Launch size{p.batch * p.heads * plan.groups, kWarps * 32, bytes(stages), stream};
  return with_scores<kDim>(p, [&]<class Scores>() -> const char* {
    if constexpr (kWarps > 4 && Scores::Kinds::kAny) {
      return "kinds of masks have no wide tiles";
    } else {
      return launch<attention_tile<T, kDim, kWarps, kKeys, Scores>>(size, p, plan);
    }
  });
}

// 128 queries a block where a head has many and their outputs leave registers for it; with kinds
// the range of keys that any of them sees would be wider, too.
template <class Call>
bool takes_wide_tiles(const Call& p, int capability) {
  return capability >= 80 && p.q_len >= 512 && padded_dim(p, p.value_dim) <= 128 && !has_kinds(p);
}

template <class T, class Call>
const char* run_tiles(const Call& p, int capability, void* stream) {
  return with_dim(padded_dim(p, p.value_dim), [&]<int kDim>() {
    if constexpr (kDim <= 128) {
      const auto wide = launch_tile<T, kDim, 8, 64, Call>,
                 narrow = launch_tile<T, kDim, 4, 64, Call>;
      return (takes_wide_tiles(p, capability) ? wide : narrow)(p, capability, stream);
    } else if constexpr (kDim == 256 && !std::is_same_v<Call, Float8Forward>) {
      const auto older = launch_tile<T, kDim, 4, 16, Call>,
                 newer = launch_tile<T, kDim, 4, 32, Call>;
      return (capability < 80 ? older : newer)(p, capability, stream);
    } else {
      return launch_tile<T, kDim, 4, 32, Call>(p, capability, stream);
    }
  });
}

}  // namespace
}  // namespace ff::cuda
