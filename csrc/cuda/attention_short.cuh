// Attention over few keys, or of few queries, for latency: all keys and values of a head, or of a
// chunk of them, are in shared memory at once, loaded in one go. A warp has 16 queries and up to 64
// keys, so that no maximum is ever revised; the warps of other keys tell each other maxima, sums
// and partial outputs. Chunks are put together by a second kernel.
#pragma once

#include <optional>

#include "exponents.cuh"

namespace ff::cuda {
namespace {

constexpr int kSlice = 64;      // keys of a warp, at most
constexpr int kMostSlices = 8;  // warps that share queries
constexpr int kMostTiles = 4;   // of 16 queries in a block

// Of a block: 12 leave 168 registers to a thread. With 16, masks of 64 columns would spill.
constexpr int most_warps(int dim) { return dim <= 64 ? 12 : 8; }

// What divides numbers below 2^31, made on the host: a division in the kernel is a chain of 20
// instructions in front of all addresses.
struct Divisor {
  uint32_t count = 1, factor = 1u << 31;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t by) : count(by < 1 ? 1 : uint32_t(by)) {
    int log = 0;
    while ((uint64_t(1) << log) < count) ++log;
    factor = uint32_t((uint64_t(1) << (31 + log)) / count + 1);
    shift = 31 + log;
  }
  FF_DEVICE uint32_t of(uint32_t x) const { return uint32_t((uint64_t(x) * factor) >> shift); }
  // The last coordinate of a flat index, which is left without it.
  FF_DEVICE int take_last(uint32_t& index) const {
    const uint32_t rest = of(index), last = index - rest * count;
    index = rest;
    return int(last);
  }
};

struct ShortPlan {
  int slices, keys;       // slices of so many keys, a multiple of 16
  int tiles;              // of 16 queries in a block
  int team;               // warps that copy a slice's keys; some of one slice may do nothing else
  bool sliced;            // warps share queries, or chunks do
  int key_room;           // elements that keys and, later on, partial outputs take
  Divisor groups;         // of tiles in a head
  Divisor chunks;         // that the keys of a head are cut into
  Divisor heads, shared;  // of a batch entry, and of those that share a key head
  float* outs;            // (B, H, chunks, Lq, Dv) sums of weighted values, where there are several
  float* statistics;      // (B, H, chunks, Lq, 2) maxima and sums
  bool natural;           // is_natural
  bool chunked;           // rows of all operands are aligned chunks of 16 bytes
};

// What a row of the keys of a slice gave.
struct alignas(8) Statistic {
  float maximum, sum;
};

struct alignas(16) Float4 {
  float at[4];
};

inline int short_bytes(const ShortPlan& plan, int dim) {
  const int queries = shared_bytes<uint16_t>(plan.tiles * 16 * dim);
  const int keys = shared_bytes<uint16_t>(plan.key_room);
  const int values = shared_bytes<uint16_t>(plan.slices * plan.keys * dim);
  return queries + keys + values + shared_bytes<Statistic>(plan.tiles * plan.slices * 16);
}

inline bool in_chunks(const View& view, int64_t batch, int64_t heads, int64_t dim) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         ((batch > 1 ? view.batch : 0) | (heads > 1 ? view.head : 0) | view.row | dim) % 8 == 0;
}

// How a call goes this way, if it does: a matter of one sequence's lengths and the device alone,
// but for what changes no bit. `dim`: the class of head dims; `most_tiles`: where warps share none.
inline std::optional<ShortPlan> short_plan(const Attention& p, int capability, int dim,
                                           int most_tiles = kMostTiles) {
  if (p.q_len > 64 && p.kv_len > kSlice) return std::nullopt;
  ShortPlan plan{};
  plan.natural = is_natural(p);
  plan.chunked = in_chunks(p.query, p.batch, p.heads, p.head_dim) &&
                 in_chunks(p.key, p.batch, p.kv_heads, p.head_dim) &&
                 in_chunks(p.value, p.batch, p.kv_heads, p.value_dim);
  plan.heads = Divisor(p.heads);
  plan.shared = Divisor(p.kv_heads > 0 ? p.heads / p.kv_heads : 1);
  plan.sliced = p.kv_len > kSlice;
  const int64_t tiles = p.q_len > 0 ? (p.q_len + 15) / 16 : 1,
                least = (p.kv_len + kSlice - 1) / kSlice;
  const auto fits = [&](int slices, int keys, int tiles) {
    plan.slices = slices, plan.keys = keys, plan.tiles = plan.team = tiles;
    plan.key_room = slices * keys * dim;
    const int parts = slices * tiles * 16 * (dim + 8) * 2;  // float32 in rows that are 8 longer
    if (plan.sliced && parts > plan.key_room) plan.key_room = parts;
    return short_bytes(plan, dim) <= shared_limit(capability);
  };
  int64_t chunks = 1;
  bool found = false;
  if (!plan.sliced) {
    const int keys = p.kv_len == 0 ? 16 : int(p.kv_len + 15) / 16 * 16;
    for (int some = int(tiles < most_tiles ? tiles : most_tiles); some > 0 && !found; --some)
      found = fits(1, keys, some);
    // A warp for each 16 keys, so that none waits for more than two rounds of copies.
    if (plan.team < keys / 16) plan.team = keys / 16;
  } else {
    // Two tiles of queries share the copies of keys. Slices are so many that warps, of which four
    // run side by side, have the least to do: 257 keys are six slices of 48, not five of 64.
    for (int some = tiles > 1 ? 2 : 1; some > 0 && !found && least <= kMostSlices; --some) {
      const int most = most_warps(dim) / some < kMostSlices ? most_warps(dim) / some : kMostSlices;
      int best = 0, best_keys = 0, best_cost = 0;
      for (int slices = int(least); slices <= most; ++slices) {
        const int keys = (int(p.kv_len + slices - 1) / slices + 15) / 16 * 16;
        const int used = int(p.kv_len + keys - 1) / keys, cost = (used * some + 3) / 4 * keys;
        if (best == 0 || cost < best_cost) best = used, best_keys = keys, best_cost = cost;
      }
      found = best > 0 && fits(best, best_keys, some);
    }
    // Chunks: longer ones would leave too few blocks. Those of few queries are half as long, as
    // what they leave to be combined is little: 1 x 1024 of 12 heads is 96 blocks.
    for (int slices = kMostSlices / 2; slices > 0 && !found; --slices) {
      found = fits(slices, tiles == 1 ? kSlice / 2 : kSlice, 1);
      chunks = (p.kv_len + slices * plan.keys - 1) / (slices * plan.keys);
    }
  }
  plan.groups = Divisor((tiles + plan.tiles - 1) / plan.tiles);
  plan.chunks = Divisor(chunks);
  return found ? std::optional(plan) : std::nullopt;
}

inline std::optional<ShortPlan> short_plan(const Attention& p, int capability) {
  return short_plan(p, capability, padded_dim(p.head_dim, p.value_dim));
}

// Floats of the workspace.
inline int64_t short_workspace(const Attention& p, const ShortPlan& plan) {
  const int64_t rows = p.batch * p.heads * plan.chunks.count * p.q_len;
  return plan.chunks.count == 1 ? 0 : rows * (p.value_dim + 2);
}

// Where the results of a chunk's rows stand.
FF_DEVICE int64_t chunk_row(const Attention& p, const ShortPlan& plan, int64_t head, int64_t chunk,
                            int64_t i) {
  return (head * plan.chunks.count + chunk) * p.q_len + i;
}

// A lane's share of copies of 16 rows of an operand, aligned chunks, by a warp: rows that are a
// constant apart, so that a copy is two additions and a comparison.
template <class T, int kDim>
struct SlabCopy {
  static constexpr int kChunks = kDim / 8, kLanes = kChunks < 8 ? kChunks : 8;
  static constexpr int kStep = 32 / kLanes, kRows = 16 / kStep;  // rows of a step, steps

  size_t source, apart;  // a number: it may stand beyond the rows, where nothing is read
  int limit, left;       // rows and columns from the lane's own first ones

  // From row `first` of head `h` on.
  FF_DEVICE SlabCopy(const View& view, int b, int h, int count, int dim, int first) {
    const int row = first + lane_index() / kLanes, column = lane_index() % kLanes * 8;
    source = reinterpret_cast<size_t>(view.data) +
             size_t(b * view.batch + h * view.head + row * view.row + column) * sizeof(T);
    apart = size_t(view.row) * (kStep * sizeof(T));
    left = dim - column;
    limit = left > 0 ? count - row : 0;
  }

  // To a slab of 16 rows.
  FF_DEVICE void load(const Tile<T, kDim>& tile) const {
    size_t from = source;
    T* to[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      to[k] = tile.chunk(lane_index() / kLanes + k * kStep, lane_index() % kLanes);
#pragma unroll
    for (int k = 0; k < kRows; ++k, from += apart)
#pragma unroll 2  // all four of 256 columns would spill on sm_75
      for (int c = 0; c < kChunks; c += kLanes)
        copy_async16(to[k % 2] + k / 2 * 2 * kStep * kDim + c * 8,
                     reinterpret_cast<const void*>(from + size_t(c * 16)),
                     k * kStep < limit && (c == 0 || c * 8 < left));
  }

  FF_DEVICE void move_on(int slabs) {
    source += size_t(slabs * kRows) * apart;
    limit -= slabs * 16;
  }

  // Zeros over those of 16 rows that it copied whose bits are not set.
  FF_DEVICE static void hide(const Tile<T, kDim>& tile, uint64_t present) {
#pragma unroll 1
    for (int k = 0; k < kRows; ++k) {
      const int row = lane_index() / kLanes + k * kStep;
      if (present >> row & 1) continue;
#pragma unroll 1
      for (int c = 0; c < kChunks; c += kLanes)
        *reinterpret_cast<Chunk*>(tile.chunk(row, lane_index() % kLanes + c)) = {0, 0, 0, 0};
    }
  }
};

// Tiles of 8 keys whose loads and products are on their way side by side. Of the last ones half may
// not be there: the rows of the first half stand in, and their scores are hidden. A branch for each
// pair of tiles would end in waits for its loads and, twice, for a product, 70 cycles of each 100.
constexpr int kGroup = 4;

// A reader of the second half of a group.
template <class T, int kDim>
FF_DEVICE Reader<T, kDim> second_half(Reader<T, kDim> reader, int tile, int tiles) {
  if (tile + kGroup / 2 < tiles) reader.row += kGroup / 2 * 8 * kDim;
  return reader;
}

// Scores of 16 queries from `row` on and so many tiles of keys from `first` on.
template <class T, int kDim, int kTiles>
FF_DEVICE void multiply_groups(const Tile<T, kDim>& query, int row, const Tile<T, kDim>& key,
                               int first, int tiles, float (&scores)[kTiles][4]) {
  constexpr int kColumns = kDim < 64 ? kDim : 64;
  const int lane = lane_index();
  Reader<T, kDim> left(query, row + lane % 16, lane / 16);
  Reader<T, kDim> right(key, first + lane % 8, lane / 8);
  clear(scores);
#pragma unroll 1
  for (int column = 0; column < kDim; column += kColumns) {
    uint32_t a[kColumns / 16][4];
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) load_matrix4(a[c], left.at(0, c * 2));
#pragma unroll
    for (int n0 = 0; n0 < kTiles; n0 += kGroup) {
      if (n0 >= tiles) break;
      const Reader<T, kDim> second = second_half(right, n0, tiles);
#pragma unroll
      for (int chunk = 0; chunk < kColumns / 8; chunk += 4) {
        uint32_t b[kGroup][4];
#pragma unroll
        for (int n = 0; n < kGroup; ++n)
          load_matrix4(b[n],
                       (n < kGroup / 2 ? right : second).at((n0 + n % (kGroup / 2)) * 8, chunk));
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < kGroup; ++n)
            mma<T>(scores[n0 + n], a[chunk / 2 + half], b[n][2 * half], b[n][2 * half + 1]);
      }
    }
    left.row += kColumns, right.row += kColumns;
  }
}

// Block `index` of a call.
template <class T, int kDim, bool kNatural>
FF_DEVICE void attend_short(const AttentionForward& p, const ShortPlan& plan, uint32_t index) {
  if constexpr (has_mma<T>()) {
    constexpr int kTiles = kSlice / 8, kChunks = kDim / 8;
    const int slices = plan.slices, warp = warp_index();
    int tile = warp, slice = 0;
    if (plan.sliced) {  // two tiles at most
      tile = warp >= slices;
      slice = warp - (tile ? slices : 0);
    }
    const int first_query = plan.groups.take_last(index) * plan.tiles * 16;
    const int chunk = plan.chunks.take_last(index), h = plan.heads.take_last(index), b = int(index);
    const int kv_head = int(plan.shared.of(uint32_t(h)));
    const int keys = slices * plan.keys, place = slice * plan.keys;
    const int first_key = chunk * keys + place;

    Shared shared;
    const Tile<T, kDim> query{shared.take<T>(plan.tiles * 16 * kDim)};
    const Tile<T, kDim> key{shared.take<T>(plan.key_room)}, value{shared.take<T>(keys * kDim)};
    Statistic* const statistics = shared.take<Statistic>(plan.tiles * slices * 16);

    // All copies are on their way before anything is waited for, flags of hidden keys included:
    // values of those become zeros later on, since 0 times NaN is NaN.
    using Copy = SlabCopy<T, kDim>;
    const int q_len = int(p.q_len), kv_len = int(p.kv_len);
    if (plan.chunked) {
      Copy copy(p.query, b, h, q_len, int(p.head_dim), first_query + warp * 16);
      Copy key_copy(p.key, b, kv_head, kv_len, int(p.head_dim), first_key + tile * 16);
      Copy value_copy(p.value, b, kv_head, kv_len, int(p.value_dim), first_key + tile * 16);
      if (warp < plan.tiles) copy.load({query.data + warp * 16 * kDim});
#pragma unroll 1
      for (int row = tile * 16; row < plan.keys; row += plan.team * 16) {
        key_copy.load({key.data + (place + row) * kDim});
        key_copy.move_on(plan.team);
      }
      commit_copies();
#pragma unroll 1
      for (int row = tile * 16; row < plan.keys; row += plan.team * 16) {
        value_copy.load({value.data + (place + row) * kDim});
        value_copy.move_on(plan.team);
      }
    }
    const Exponents<kNatural> exponents(p, b, h);
    const int last_key = first_key + plan.keys < kv_len ? first_key + plan.keys : kv_len;
    const KeyFlags flags(exponents.padding, first_key, last_key);
    if (!plan.chunked) {
#pragma unroll 1
      for (int operand = 0; operand < 3; ++operand) {
        const bool queries = operand == 0;
        const View& view = queries ? p.query : operand == 1 ? p.key : p.value;
        const Head<T> head(view, b, queries ? h : kv_head, queries ? p.q_len : p.kv_len,
                           operand == 2 ? p.value_dim : p.head_dim);
        const int first = queries ? first_query : first_key;
        T* const to = queries ? query.data : (operand == 1 ? key.data : value.data) + place * kDim;
        const int thread = queries ? thread_index() : tile * 32 + lane_index();
        const RowCopy<T, kDim> copy(head, first, uint32_t(thread),
                                    uint32_t((queries ? slices : 1) * plan.team * 32));
        copy.template load_plain<false>(
            Tile<T, kDim>{to}, queries ? plan.tiles * 16 : plan.keys,
            operand == 2 ? flags.present() : first_bits(head.count - first));
      }
    }
    commit_copies();

    const int row = first_query + tile * 16;
    const Hiding<kTiles, kNatural> hiding(exponents, row, first_key);
    const uint64_t present = flags.present();
    const auto hide_values = [&] {
      if (!exponents.padding.data || !plan.chunked) return;
#pragma unroll 1
      for (int row = tile * 16; row < plan.keys; row += plan.team * 16)
        Copy::hide({value.data + (place + row) * kDim}, present >> row);
    };
    if (plan.sliced) {
      wait_copies<1>();
    } else {
      wait_copies<0>();  // of at most 64 keys all are there at once
      hide_values();
    }
    barrier();
    if (plan.chunks.count > 1) start_next();
    if (tile >= plan.tiles) return;  // it only helped to copy, and there is no barrier to come

    float weights[kTiles][4];
    multiply_groups(query, tile * 16, key, place, plan.keys / 8, weights);
    hiding.apply(exponents, row, first_key, present, weights);

    float tops[4], maximum[2], sum[2] = {}, shift[2];  // four chains are half as long as two
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      tops[i] = weights[0][i];
#pragma unroll
      for (int n = 1; n < kTiles; ++n) tops[i] = fmaxf(tops[i], weights[n][i]);
    }
    maximum[0] = fmaxf(tops[0], tops[1]), maximum[1] = fmaxf(tops[2], tops[3]);
#pragma unroll
    for (int r = 0; r < 2; ++r)
      maximum[r] = exponents.maximum(row_maximum(maximum[r])), shift[r] = finite(maximum[r]);

    if (plan.sliced) {
      wait_copies<0>();
      hide_values();
      barrier();  // values are there, and nobody reads keys any more
    }
    float out[kDim / 8][4];
    clear(out);
    const Reader<T, kDim> values = value_reader(value, place);
#pragma unroll
    for (int n0 = 0; n0 < kTiles; n0 += kGroup) {
      if (n0 * 8 >= plan.keys) break;
      uint32_t a[kGroup / 2][4];
#pragma unroll
      for (int n = n0; n < n0 + kGroup; n += 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          weights[n][i] = exponents.power(weights[n][i], shift[i / 2]);
          weights[n + 1][i] = exponents.power(weights[n + 1][i], shift[i / 2]);
          sum[i / 2] += weights[n][i] + weights[n + 1][i];
        }
        left_operand<T>(weights[n], weights[n + 1], a[(n - n0) / 2]);
      }
      add_product(a[0], values, n0 * 8, out);
      add_product(a[1], second_half(values, n0, plan.keys / 8), n0 * 8, out);
    }
    sum[0] = row_sum(sum[0]), sum[1] = row_sum(sum[1]);

    if (!plan.sliced) {
      store_means(query, tile * 16, p.out, b, h, row, q_len, int(p.value_dim), sum, out);
      store_lses(exponents, p.lse, b, h, row, q_len, maximum, sum);
      return;
    }

    // Partial outputs of each slice under its own maximum, 16 rows of float32 a warp, where the
    // keys were: maxima and outputs are exchanged at once. Threads then add up eight columns of a
    // row each.
    constexpr int kStride = kDim + 8;
    float* const parts = reinterpret_cast<float*>(key.data);
    const int at = warp * 16 + lane_index() / 4;
    if (lane_index() % 4 == 0) {
      statistics[at] = {maximum[0], sum[0]};
      statistics[at + 8] = {maximum[1], sum[1]};
    }
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[(at + i / 2 * 8) * kStride + d * 8 + lane_index() % 4 * 2 + i % 2] = out[d][i];
    barrier();
    const int dim = int(p.value_dim);
#pragma unroll 1
    for (int unit = thread_index(); unit < plan.tiles * 16 * kChunks;
         unit += plan.tiles * slices * 32) {
      const int above = unit / kChunks, column = unit % kChunks * 8, i = first_query + above;
      if (i >= q_len || column >= dim) continue;
      const int first = above / 16 * slices * 16 + above % 16;
      float maximum = -kInfinity, total = 0.0f, columns[8] = {};
#pragma unroll
      for (int s = 0; s < kMostSlices; ++s)
        maximum = fmaxf(maximum, statistics[first + (s < slices ? s : 0) * 16].maximum);
      const float shift = finite(maximum);
      constexpr int kBatch = 4;  // slices of which the loads are on their way at once
#pragma unroll 1
      for (int s0 = 0; s0 < slices; s0 += kBatch)
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int from = first + (s0 + k < slices ? s0 + k : 0) * 16;
          const float weight =
              s0 + k < slices ? exponents.rescale(statistics[from].maximum, shift) : 0.0f;
          total += weight * statistics[from].sum;
#pragma unroll
          for (int e = 0; e < 8; e += 4) {
            const auto part = *reinterpret_cast<const Float4*>(parts + from * kStride + column + e);
#pragma unroll
            for (int j = 0; j < 4; ++j) columns[e + j] += weight * part.at[j];
          }
        }
      if (plan.chunks.count == 1) {
        const float factor = inverse(total);
        Chunk packed;
#pragma unroll
        for (int e = 0; e < 8; e += 2)
          packed.words[e / 2] = pack<T>(columns[e] * factor, columns[e + 1] * factor);
        store_chunk(output_row<T>(p.out, b, h, i) + column, packed, dim - column);
        if (column == 0) store_lse(p.lse, b, h, i, exponents.log_sum(maximum, total));
      } else {
        const int64_t to = chunk_row(p, plan, b * p.heads + h, chunk, i);
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (column + e < dim) plan.outs[to * dim + column + e] = columns[e];
        if (column == 0) plan.statistics[2 * to] = maximum, plan.statistics[2 * to + 1] = total;
      }
    }
  }
}

template <class T, int kDim, bool kNatural>
FF_KERNEL(most_warps(kDim) * 32)
attention_short(const AttentionForward p, const ShortPlan plan) {
  attend_short<T, kDim, kNatural>(p, plan, uint32_t(block_index()));
}

constexpr int kCombined = 4;  // rows of a block, a warp each

// Rows of all chunks to the output, in order:
//     w_c = 2^(m_c - max m)      out = sum_c w_c out_c / sum_c w_c l_c
// Lanes have a chunk's statistics each, then two columns. Values of eight chunks are on their way
// while those before them are added up, and the first of them while maxima are.
template <class T>
FF_KERNEL(kCombined * 32)
combine_chunks(const AttentionForward p, const ShortPlan plan) {
  wait_before();
  const int64_t row_index = block_index() * kCombined + warp_index();
  if (row_index >= p.batch * p.heads * p.q_len) return;
  uint32_t index = uint32_t(row_index);
  const int i = take_last(index, p.q_len);
  const int64_t head = index;
  const int h = take_last(index, p.heads), b = int(index), chunks = int(plan.chunks.count);
  // Row i of chunk c stands `apart` rows behind that of chunk c - 1.
  const int64_t apart = p.q_len, first = head * chunks * apart + i;
  const int lane = lane_index(), dim = int(p.value_dim);
  constexpr int kBatch = 8;
  float values[kBatch][2];
  const auto load = [&](int start, int c0) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int c = c0 + k < chunks ? c0 + k : chunks - 1;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = start + lane + e * 32 < dim ? start + lane + e * 32 : dim - 1;
        values[k][e] = plan.outs[(first + c * apart) * dim + d];
      }
    }
  };
  load(0, 0);
  const auto statistic = [&](int c) {
    const auto* of = reinterpret_cast<const float*>(plan.statistics) + 2 * (first + c * apart);
    return c < chunks ? Statistic{of[0], of[1]} : Statistic{-kInfinity, 0.0f};
  };
  const float unit = plan.natural ? kLog2E : 1.0f;
  const Statistic own = statistic(lane);
  float maximum = own.maximum;
#pragma unroll 1
  for (int c = lane + 32; c < chunks; c += 32) maximum = fmaxf(maximum, statistic(c).maximum);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));
  const float shift = finite(maximum);
  T* const row = output_row<T>(p.out, b, h, i);
  float sum = 0.0f, factor = 0.0f;
#pragma unroll 1
  for (int start = 0; start < dim; start += 64) {
    float out[2] = {}, weight = 0.0f;
#pragma unroll 1
    for (int c0 = 0; c0 < chunks; c0 += kBatch) {
      if (c0 % 32 == 0) {
        const Statistic of = c0 == 0 ? own : statistic(c0 + lane);
        weight = exp2((of.maximum - shift) * unit);
        if (start == 0) sum += weight * of.sum;
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const float factor = shuffle(weight, c0 % 32 + k);
        out[0] += factor * values[k][0], out[1] += factor * values[k][1];
      }
      const bool done = c0 + kBatch >= chunks;
      if (!done || start + 64 < dim) load(done ? start + 64 : start, done ? 0 : c0 + kBatch);
    }
    if (start == 0) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      factor = inverse(sum);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (start + lane + e * 32 < dim) row[start + lane + e * 32] = from_float<T>(out[e] * factor);
  }
  if (lane == 0) {
    const float lse = plan.natural ? Units<true>(p.scale).log_sum(maximum, sum)
                                   : Units<false>(p.scale).log_sum(maximum, sum);
    store_lse(p.lse, b, h, i, lse);
  }
}

template <class T>
const char* run_short(const AttentionForward& p, ShortPlan plan, void* workspace, void* stream) {
  const int64_t heads = p.batch * p.heads;
  if (heads * p.q_len > 0xffffffff) return "more than 2^32 queries";
  plan.outs = static_cast<float*>(workspace);
  plan.statistics = plan.outs + heads * plan.chunks.count * p.q_len * p.value_dim;
  const char* error = with_dim(padded_dim(p.head_dim, p.value_dim), [&]<int kDim>() {
    const Launch size{heads * plan.chunks.count * plan.groups.count, plan.slices * plan.team * 32,
                      short_bytes(plan, kDim), stream};
    if (plan.natural) return launch<attention_short<T, kDim, true>>(size, p, plan);
    return launch<attention_short<T, kDim, false>>(size, p, plan);
  });
  if (error || plan.chunks.count == 1) return error;
  const int64_t blocks = (heads * p.q_len + kCombined - 1) / kCombined;
  return launch<combine_chunks<T>>({blocks, kCombined * 32, 0, stream, true}, p, plan);
}

}  // namespace
}  // namespace ff::cuda
