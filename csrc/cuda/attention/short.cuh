// Attention over few keys, or of few queries, for latency: all keys and values of a head, or of a
// chunk of them, are in shared memory at once, loaded in one go. A warp has 16 queries and up to 64
// keys, so that no maximum is ever revised; the warps of other keys tell each other maxima, sums
// and partial outputs. Chunks are put together by a second kernel.
#pragma once

#include <optional>

#include "float8.cuh"

namespace ff::cuda {
namespace {

constexpr int kSlice = 64;     // keys of a warp
constexpr int kMostTiles = 4;  // of 16 queries in a block, where warps share none

// Warps that share queries: ten have the 577 tokens of a picture of 24 x 24 patches. Of wider heads
// no shared memory holds what eight have.
constexpr int most_slices(int dim) { return dim <= 64 ? 10 : 8; }

struct ShortPlan {
  int slices, keys;   // slices of so many keys, a multiple of 16; the last may have fewer
  int rows;           // keys of all slices, likewise
  int tiles;          // of 16 queries in a block
  int64_t groups;     // of tiles in a head
  int64_t chunks;     // that the keys of a head are cut into
  float* outs;        // (B, H, chunks, Lq, Dv) sums of weighted values, where there are several
  float* statistics;  // (B, H, chunks, Lq, 2) maxima and sums
  bool natural;       // is_natural
};

inline int short_bytes(const ShortPlan& plan, int dim) {
  const int queries = shared_bytes<uint16_t>(plan.tiles * 16 * dim);
  const int keys = shared_bytes<uint16_t>(plan.rows * dim);
  const int statistics = shared_bytes<float>(plan.tiles * plan.slices * 16);
  return queries + 2 * keys + 2 * statistics;
}

// How a call goes this way, if it does: a matter of one sequence's lengths and the device alone.
template <class Call>
std::optional<ShortPlan> short_plan(const Call& p, int capability) {
  if (p.q_len > 64 && p.kv_len > kSlice) return std::nullopt;
  ShortPlan plan{1, kSlice, kSlice, 1, 0, 1, nullptr, nullptr, is_natural(p)};
  const int dim = padded_dim(p, p.value_dim), keys = int(p.kv_len + 15) / 16 * 16;
  const auto fits = [&] { return short_bytes(plan, dim) <= shared_limit(capability); };
  const int64_t tiles = p.q_len > 0 ? (p.q_len + 15) / 16 : 1,
                slices = (p.kv_len + kSlice - 1) / kSlice;
  if (slices <= 1) {
    plan.keys = plan.rows = keys == 0 ? 16 : keys;
    plan.tiles = int(tiles < kMostTiles ? tiles : kMostTiles);
    while (plan.tiles > 1 && !fits()) --plan.tiles;
  } else {
    const auto take = [&](int64_t count) {
      plan.slices = int(count);
      plan.rows = count < slices ? plan.slices * kSlice : keys;
    };
    take(slices < most_slices(dim) ? slices : most_slices(dim));
    while (plan.slices > 1 && !fits()) take(plan.slices - 1);
    constexpr int kChunk = 4;  // longer ones would leave too few blocks
    if (plan.slices < slices && plan.slices > kChunk) take(kChunk);
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

template <class T, int kDim, class Scores>
FF_KERNEL(most_slices(kDim) * 32)
attention_short(const typename Scores::Call p, const ShortPlan plan) {
  if constexpr (has_mma<T>() && (!Scores::kFloat8 || has_float8())) {
    constexpr int kTiles = kSlice / 8, kChunks = kDim / 8;
    // Either warps share queries or they share keys. A slice may be alone in its chunk, where
    // shared memory holds no two.
    const bool sliced = plan.slices > 1 || plan.chunks > 1;
    const int slice = sliced ? warp_index() : 0, tile = sliced ? 0 : warp_index();
    uint32_t index = uint32_t(block_index());
    const int first_query = take_last(index, plan.groups) * plan.tiles * 16;
    const int chunk = take_last(index, plan.chunks), h = take_last(index, p.heads), b = int(index);
    const int place = slice * plan.keys, first_key = chunk * plan.rows + place;
    const int keys = plan.rows - place < plan.keys ? plan.rows - place : plan.keys;

    const Exponents<Scores> exponents(p, b, h, score_scale<Scores>(p, b, h));
    const KeyFlags flags(exponents.padding, first_key, exponents.kv_len);

    Shared shared;
    const SharedTile<T, kDim> query{shared.take<T>(plan.tiles * 16 * kDim)};
    const SharedTile<T, kDim> key{shared.take<T>(plan.rows * kDim)},
        value{shared.take<T>(plan.rows * kDim)};
    float* const maxima = shared.take<float>(plan.slices * 16);
    float* const sums = shared.take<float>(plan.slices * 16);

    // The operands in a loop: a launch is bound by the way of its instructions to the SM.
    uint64_t present = 0;
#pragma unroll 1
    for (int operand = 0; operand < 3; ++operand) {
      const bool queries = operand == 0, own = sliced && !queries;
      const int first = queries ? first_query : first_key;
      const View& view = queries ? p.query : operand == 1 ? p.key : p.value;
      const Head<T> head(view, b, queries ? h : kv_head_of(p, h), queries ? p.q_len : p.kv_len,
                         operand == 2 ? p.value_dim : p.head_dim);
      present = operand == 2 ? flags.present() : first_bits(head.count - first);
      if constexpr (Scores::Kinds::kAny) {
        if (!queries) present &= exponents.places.reach(first_query, plan.tiles * 16, first);
      }
      T* const to = queries ? query.data : (operand == 1 ? key.data : value.data) + place * kDim;
      if constexpr (Scores::kFloat8) {
        if (!queries) {
          load_float8(view, b, kv_head_of(p, h), head.dim, first, SharedTile<T, kDim>{to}, keys,
                      present, own ? lane_index() : thread_index(), own ? 32 : plan.tiles * 32);
          commit_copies();
          continue;
        }
      }
      const RowCopy<T, kDim> copy(head, first, uint32_t(own ? lane_index() : thread_index()),
                                  uint32_t(own ? 32 : plan.slices * plan.tiles * 32));
      copy.template load<false>(SharedTile<T, kDim>{to}, queries ? plan.tiles * 16 : keys, present);
      if (!queries) commit_copies();
    }

    const int row = first_query + tile * 16;
    const Hiding<kTiles, Scores> hiding(exponents, row, first_key);
    wait_copies<1>();
    barrier();
    float weights[kTiles][4];
    multiply_scores<1>(query, tile * 16, key, place, keys / 8, weights);
    hiding.apply(exponents, row, first_key, present, weights);

    const int at = slice * 16 + lane_index() / 4;  // of the first row's maximum and sum
    float maximum[2] = {-kInfinity, -kInfinity}, sum[2] = {}, shift[2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) maximum[i / 2] = fmaxf(maximum[i / 2], weights[n][i]);
    maximum[0] = row_maximum(maximum[0]), maximum[1] = row_maximum(maximum[1]);
    // Of all warps that share a row, one has its sink.
    [[maybe_unused]] float sink = -kInfinity;
    if constexpr (Scores::Kinds::kAny) {
      if (slice == 0 && chunk == 0) sink = exponents.kinds.sink;
      maximum[0] = fmaxf(maximum[0], sink), maximum[1] = fmaxf(maximum[1], sink);
    }
    if (sliced) {
      if (lane_index() % 4 == 0) maxima[at] = maximum[0], maxima[at + 8] = maximum[1];
      barrier();
#pragma unroll 1
      for (int other = lane_index() / 4; other < plan.slices * 16; other += 16) {
        maximum[0] = fmaxf(maximum[0], maxima[other]);
        maximum[1] = fmaxf(maximum[1], maxima[other + 8]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
      maximum[r] = exponents.maximum(maximum[r]), shift[r] = finite(maximum[r]);
    if constexpr (Scores::Kinds::kAny) {
      for (int r = 0; r < 2; ++r)
        sum[r] = sink_weight(sink, lane_index() % 4) * exponents.power(sink, shift[r]);
    }

    wait_copies<0>();
    barrier();  // values are there, and nobody reads keys any more
    float out[kDim / 8][4];
    clear(out);
    const Reader<T, kDim> values = value_reader(value, place);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (n * 8 >= keys) break;
      add_weighted(exponents, weights[n], weights[n + 1], shift, values, n * 8, sum, out);
    }
    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);
    apply_value_scale<Scores>(p, b, h, out);

    if (!sliced) {
      store_means(query, tile * 16, p.out, b, h, row, int(p.q_len), int(p.value_dim), sum, out);
      store_lses(exponents, p.lse, b, h, row, int(p.q_len), maximum, sum);
      return;
    }

    // Partial outputs, 16 rows of float32 a warp, where the keys were: 64 rows of 16 bits, and 16
    // at least of the last. Threads add up eight columns of a row each, and row maxima stay as they
    // are among all slices.
    constexpr int kStride = kDim + 8;
    static_assert(2 * 16 * kStride * sizeof(float) <= (kSlice + 16) * kDim * sizeof(T));
    float* const parts = reinterpret_cast<float*>(key.data);
    if (lane_index() % 4 == 0) {
      sums[at] = sum[0], sums[at + 8] = sum[1];
      if (slice == 0) maxima[at] = maximum[0], maxima[at + 8] = maximum[1];
    }
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[(at + i / 2 * 8) * kStride + d * 8 + lane_index() % 4 * 2 + i % 2] = out[d][i];
    barrier();
    const int dim = int(p.value_dim);
#pragma unroll 1
    for (int unit = thread_index(); unit < 16 * kChunks; unit += plan.slices * 32) {
      const int above = unit / kChunks, column = unit % kChunks * 8, i = row + above;
      // The first column stands for the statistics, also where there are no values.
      if (i >= p.q_len || (column > 0 && column >= dim)) continue;
      float total = 0.0f, columns[8] = {};
#pragma unroll 1
      for (int other = above; other < plan.slices * 16; other += 16) {
        total += sums[other];
#pragma unroll
        for (int e = 0; e < 8; ++e) columns[e] += parts[other * kStride + column + e];
      }
      if (plan.chunks == 1) {
        const float factor = inverse(total);
        Chunk packed;
#pragma unroll
        for (int e = 0; e < 8; e += 2)
          packed.words[e / 2] = pack<T>(columns[e] * factor, columns[e + 1] * factor);
        if (dim > 0) store_chunk(output_row<T>(p.out, b, h, i) + column, packed, dim - column);
        if (column == 0) store_lse(p.lse, b, h, i, exponents.log_sum(maxima[above], total));
      } else {
        const int64_t to = chunk_row(p, plan, b * p.heads + h, chunk, i);
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (column + e < dim) plan.outs[to * dim + column + e] = columns[e];
        if (column == 0)
          plan.statistics[2 * to] = maxima[above], plan.statistics[2 * to + 1] = total;
      }
    }
  }
}

constexpr int kCombined = 4;  // rows of a block, a warp each

// Rows of all chunks to the output, in order:
//     w_c = 2^(m_c - max m)      out = sum_c w_c out_c / sum_c w_c l_c
// Lanes have a chunk's statistics each, then a column.
template <class T>
FF_KERNEL(kCombined * 32)
combine_chunks(const AttentionForward p, const ShortPlan plan) {
  const int64_t row_index = block_index() * kCombined + warp_index();
  if (row_index >= p.batch * p.heads * p.q_len) return;
  uint32_t index = uint32_t(row_index);
  const int i = take_last(index, p.q_len);
  const int64_t head = index;
  const int h = take_last(index, p.heads), b = int(index), chunks = int(plan.chunks);
  // Row i of chunk c stands `apart` rows behind that of chunk c - 1.
  const int64_t apart = p.q_len, first = head * plan.chunks * apart + i;
  const float unit = plan.natural ? kLog2E : 1.0f;
  const int lane = lane_index();
  float maximum = -kInfinity;
#pragma unroll 1
  for (int c = lane; c < chunks; c += 32)
    maximum = fmaxf(maximum, plan.statistics[2 * (first + c * apart)]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));
  const float shift = finite(maximum);
  T* const row = output_row<T>(p.out, b, h, i);
  float sum = 0.0f, factor = 0.0f;
#pragma unroll 1
  for (int start = -32; start < p.value_dim; start += 32) {  // first the sum, then columns
    const int d = start + lane < p.value_dim ? start + lane : int(p.value_dim) - 1;
    float out = 0.0f;
#pragma unroll 1
    for (int c0 = 0; c0 < chunks; c0 += 32) {
      float weight = 0.0f;
      if (c0 + lane < chunks) {
        const float* of = plan.statistics + 2 * (first + (c0 + lane) * apart);
        weight = exp2((of[0] - shift) * unit);
        if (start < 0) sum += weight * of[1];
      }
      if (start < 0) continue;
      const int count = chunks - c0 < 32 ? chunks - c0 : 32;
      const float* from = plan.outs + (first + c0 * apart) * p.value_dim + d;
#pragma unroll 4
      for (int c = 0; c < count; ++c) out += shuffle(weight, c) * from[c * (apart * p.value_dim)];
    }
    if (start < 0) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      factor = inverse(sum);
    } else if (start + lane < p.value_dim) {
      row[d] = from_float<T>(out * factor);
    }
  }
  if (lane == 0) {
    const float lse = plan.natural ? Units<true>(p.scale).log_sum(maximum, sum)
                                   : Units<false>(p.scale).log_sum(maximum, sum);
    store_lse(p.lse, b, h, i, lse);
  }
}

template <class T, class Call>
const char* run_short(const Call& p, ShortPlan plan, void* workspace, void* stream) {
  const int64_t heads = p.batch * p.heads;
  if (heads * p.q_len > 0xffffffff) return "more than 2^32 queries";
  plan.outs = static_cast<float*>(workspace);
  plan.statistics = plan.outs + heads * plan.chunks * p.q_len * p.value_dim;
  const char* error = with_dim(padded_dim(p, p.value_dim), [&]<int kDim>() {
    const Launch size{heads * plan.chunks * plan.groups, plan.slices * plan.tiles * 32,
                      short_bytes(plan, kDim), stream};
    return with_scores<kDim>(
        p, [&]<class Scores>() { return launch<attention_short<T, kDim, Scores>>(size, p, plan); });
  });
  if (error || plan.chunks == 1) return error;
  const int64_t blocks = (heads * p.q_len + kCombined - 1) / kCombined;
  const AttentionForward& outputs = p;
  return launch<combine_chunks<T>>({blocks, kCombined * 32, 0, stream}, outputs, plan);
}

}  // namespace
}  // namespace ff::cuda
