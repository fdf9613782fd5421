// Tiles of rows in shared memory, and what a warp makes of them on tensor cores.
//
// A warp owns 16 rows of scores. Of each 16x8 tile a lane holds four: rows lane / 4 and that + 8,
// columns lane % 4 * 2 and the next.
#pragma once

#include <cstddef>

#include "calls.h"
#include "device.h"
#include "diagonal.h"

namespace ff::cuda {
namespace {

constexpr float kInfinity = __builtin_inff();

// Rows of kDim 16-bit values. Their 16-byte chunks are swizzled so that the same chunk of eight
// rows in sequence lies in all 32 banks, as the loads of matrices want it. At 64 values, by number:
//
//     row 0    0 1 2 3 4 5 6 7
//     row 1    1 0 3 2 5 4 7 6
//     row 2    2 3 0 1 6 7 4 5
//     ...
//     row 7    7 6 5 4 3 2 1 0
template <class T, int kDim>
struct SharedTile {
  static_assert(kDim == 32 || kDim % 64 == 0);
  static constexpr int kChunks = kDim / 8;

  T* data;

  FF_DEVICE static int swizzled(int row, int chunk) {
    return chunk ^ (kChunks == 4 ? row >> 1 & 3 : row & 7);
  }
  FF_DEVICE T* chunk(int row, int chunk) const {
    return data + row * kDim + swizzled(row, chunk) * 8;
  }
};

// What a lane reads of a tile: a chunk of a row, and those that are whole eights of rows away, and
// so many chunks that their sum carries nothing: then swizzling is one xor with a constant, and
// rows are constant offsets of the load.
template <class T, int kDim>
struct Reader {
  static constexpr int kSwizzled =
      SharedTile<T, kDim>::kChunks < 8 ? SharedTile<T, kDim>::kChunks : 8;

  const T* row;
  int own;  // element of the row

  FF_DEVICE Reader(const SharedTile<T, kDim>& tile, int row, int chunk)
      : row(tile.data + row * kDim), own(tile.swizzled(row, chunk) * 8) {}
  FF_DEVICE const T* at(int rows, int chunks) const {
    return row + (own ^ (chunks % kSwizzled * 8)) +
           (rows * kDim + chunks / kSwizzled * kSwizzled * 8);
  }
};

struct alignas(16) Chunk {
  uint32_t words[4];  // eight 16-bit values
};

// The last coordinate of a flat index, which is left without it. In 32 bits, as a grid's size has:
// in 64 a division is a function call.
FF_DEVICE int take_last(uint32_t& index, int64_t count) {
  const uint32_t size = uint32_t(count);
  if (size == 1) return 0;  // as a rule, and a division is 20 instructions in a chain
  const uint32_t last = index % size;
  index /= size;
  return int(last);
}

// The key head of a query head.
FF_DEVICE int kv_head_of(const Attention& p, int h) {
  if (p.heads == p.kv_heads) return h;
  return int(uint32_t(h) / (uint32_t(p.heads) / uint32_t(p.kv_heads)));
}

// One head of an operand: `count` rows of `dim` adjacent values.
template <class T>
struct Head {
  const T* data;
  int64_t stride;
  int count, dim;
  bool chunked;  // rows are whole chunks of 16 bytes and begin at multiples of that

  FF_DEVICE Head(const View& view, int64_t b, int64_t h, int64_t count, int64_t dim)
      : data(static_cast<const T*>(view.data) + b * view.batch + h * view.head),
        stride(view.row),
        count(int(count)),
        dim(int(dim)),
        chunked(reinterpret_cast<size_t>(data) % 16 == 0 && (int(stride) | int(dim)) % 8 == 0) {}
};

// Flags of hidden keys of a batch entry, or none.
struct Padding {
  const Bool* data = nullptr;
  int64_t stride = 0;

  FF_DEVICE Padding(const Bool* all, int64_t batch, int64_t column, int64_t b)
      : data(all ? all + b * batch : nullptr), stride(column) {}
  FF_DEVICE bool hides(int i) const { return data && data[i * stride]; }
};

// What hides two of 64 keys in sequence, those of the lane's number and 32 on: loaded side by side,
// ahead of where the warp wants the bits of all.
struct KeyFlags {
  uint32_t hidden[2];

  FF_DEVICE KeyFlags(const Padding& padding, int first, int count) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first + lane_index() + 32 * i;
      hidden[i] = key >= count;
      if (padding.data && key < count) hidden[i] = padding.data[key * padding.stride].byte;
    }
  }

  // Bit by bit, which keys are there and not hidden.
  FF_DEVICE uint64_t present() const {
    const uint32_t low = ballot(hidden[0] == 0), high = ballot(hidden[1] == 0);
    return low | uint64_t(high) << 32;
  }
};

// A thread's share of copies of a head's rows into tiles. Up to eight lanes have a row, and a
// thread the same chunks of every step-th one, so that its addresses are a few sums: 9 instructions
// a copy of 64 columns on sm_90, where a loop over single chunks takes 43.
template <class T, int kDim>
struct RowCopy {
  static constexpr int kChunks = SharedTile<T, kDim>::kChunks, kLanes = kChunks < 8 ? kChunks : 8;

  bool chunked;
  int row, chunk, step;  // the first row, the first chunk, and rows to the next one
  int left;              // columns from there on
  int64_t stride;
  size_t source;  // a number: it may stand beyond the rows, where nothing is read

  // From row `first` on, by `threads` threads, whole warps, of which this is number `thread`.
  FF_DEVICE RowCopy(const Head<T>& from, int first, uint32_t thread, uint32_t threads)
      : chunked(from.chunked),
        row(int(thread / kLanes)),
        chunk(int(thread % kLanes)),
        step(int(threads / kLanes)),
        left(from.dim - chunk * 8),
        stride(from.stride * int64_t(sizeof(T))),
        source(reinterpret_cast<size_t>(from.data) + size_t(first + row) * size_t(stride) +
               size_t(chunk * 16)) {}

  FF_DEVICE void move_on(int rows) { source += size_t(rows) * size_t(stride); }

  // So many rows, zeros for those behind the first `limit`, or where the row's bit in `present` is
  // not set. kEven: all threads have as many. Asynchronous in part.
  template <bool kEven, class Present>
  FF_DEVICE void load(const SharedTile<T, kDim>& tile, int rows, Present present) const {
    if (chunked) return load_chunks<kEven>(tile, rows, present);
    load_plain<kEven>(tile, rows, present);
  }

  template <bool kEven, class Present>
  FF_DEVICE void load_plain(const SharedTile<T, kDim>& tile, int rows, Present present) const {
    size_t from = source;
    const size_t apart = size_t(step) * size_t(stride);
#pragma unroll 1
    for (int i = kEven ? 0 : row; i < rows; i += step, from += apart) {
#pragma unroll 1
      for (int c = 0; c < kChunks; c += kLanes) {
        const T* values = reinterpret_cast<const T*>(from) + c * 8;
        T* to = tile.chunk(kEven ? row + i : i, chunk + c);
        const int some = valid<kEven>(present, i) ? left - c * 8 : 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e] = e < some ? values[e] : T{0};
      }
    }
  }

  template <bool kEven, class Present>
  FF_DEVICE void load_chunks(const SharedTile<T, kDim>& tile, int rows, Present present) const {
    size_t from = source;
    const size_t apart = size_t(step) * size_t(stride);
    // Rows of a thread that are on their way at once below sm_80, or whose code is.
    constexpr int kBatch = kEven || FF_ARCH < 80 ? 4 : 1;
    // Two steps are a multiple of eight rows, after which the order of chunks repeats.
    T* to[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) to[k] = tile.chunk(row + k * step, chunk);
#pragma unroll 1
    for (int i = kEven ? 0 : row; i < rows; i += kBatch * step) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        T* const place = to[k % 2];
        if (i + k * step < rows) {
          const bool there = valid<kEven>(present, i + k * step) && left > 0;
#pragma unroll 2  // all four of 256 columns would spill on sm_75, in registers, and on sm_100
          for (int c = 0; c < kChunks; c += kLanes)
            copy_async16(place + c * 8, reinterpret_cast<const void*>(from + size_t(c * 16)),
                         there && (c == 0 || c * 8 < left));
        }
        from += apart;
        to[k % 2] = place + 2 * step * kDim;
      }
      if constexpr (kBatch == 1) {
        T* const next = to[1];
        to[1] = to[0], to[0] = next;
      }
    }
  }

 private:
  // kEven counts rows from the thread's own: then one is there for all threads or for none.
  template <bool kEven>
  FF_DEVICE bool valid(int limit, int i) const {
    return i < (kEven ? limit - row : limit);
  }
  template <bool kEven>
  FF_DEVICE bool valid(uint64_t present, int i) const {
    return (kEven ? present >> row : present) >> i & 1;
  }
};

// scores[n] = rows `row` .. row + 16 of `query` times keys first + 8 n .. of `key`, for n < tiles,
// an even number; the rest is 0. Rows are multiples of 8. kUnroll: how many 64 columns are
// unrolled.
template <int kUnroll, class T, int kDim, int kTiles>
FF_DEVICE void multiply_scores(const SharedTile<T, kDim>& query, int row,
                               const SharedTile<T, kDim>& key, int first, int tiles,
                               float (&scores)[kTiles][4]) {
  constexpr int kColumns = kDim < 64 ? kDim : 64;
  const int lane = lane_index();
  Reader<T, kDim> left(query, row + lane % 16, lane / 16);
  Reader<T, kDim> right(key, first + lane % 8, lane / 8);
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
#pragma unroll kUnroll
  for (int column = 0; column < kDim; column += kColumns) {
#pragma unroll
    for (int chunk = 0; chunk < kColumns / 8; chunk += 4) {
      uint32_t a[2][4];
      load_matrix4(a[0], left.at(0, chunk));
      load_matrix4(a[1], left.at(0, chunk + 2));
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        if (n >= tiles) break;
        uint32_t b[2][4];
        load_matrix4(b[0], right.at(n * 8, chunk));
        load_matrix4(b[1], right.at(n * 8 + 8, chunk));
        mma<T>(scores[n], a[0], b[0][0], b[0][1]);
        mma<T>(scores[n + 1], a[0], b[1][0], b[1][1]);
        mma<T>(scores[n], a[1], b[0][2], b[0][3]);
        mma<T>(scores[n + 1], a[1], b[1][2], b[1][3]);
      }
    }
    left.row += kColumns, right.row += kColumns;
  }
}

// A 16x16 tile of weights as the left operand.
template <class T>
FF_DEVICE void left_operand(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = pack<T>(low[0], low[1]), a[1] = pack<T>(low[2], low[3]);
  a[2] = pack<T>(high[0], high[1]), a[3] = pack<T>(high[2], high[3]);
}

// Of 16 rows of values, the first of them at `first`.
template <class T, int kDim>
FF_DEVICE Reader<T, kDim> value_reader(const SharedTile<T, kDim>& value, int first) {
  return {value, first + lane_index() % 16, lane_index() / 16};
}

// out += a times 16 rows of values, those `rows` behind the reader's.
template <class T, int kDim>
FF_DEVICE void add_product(const uint32_t (&a)[4], const Reader<T, kDim>& value, int rows,
                           float (&out)[kDim / 8][4]) {
#pragma unroll
  for (int d = 0; d < kDim / 8; d += 2) {
    uint32_t b[4];
    load_matrix4_transposed(b, value.at(rows, d));
    mma<T>(out[d], a, b[0], b[1]);
    mma<T>(out[d + 1], a, b[2], b[3]);
  }
}

template <int kTiles>
FF_DEVICE void clear(float (&tiles)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) tiles[n][i] = 0.0f;
}

// Over the four lanes that share a row.
FF_DEVICE float row_maximum(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
FF_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// Two neighbours of a row of the output, as far as they are there.
template <class T>
FF_DEVICE void store_pair(T* row, int column, int dim, float first, float second) {
  T* to = row + column;
  if (column + 1 < dim && reinterpret_cast<size_t>(to) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
  } else {
    if (column < dim) to[0] = from_float<T>(first);
    if (column + 1 < dim) to[1] = from_float<T>(second);
  }
}

template <class T>
FF_DEVICE T* output_row(const MutableView& out, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(out.data) + b * out.batch + h * out.head + i * out.row;
}

// Of a sum of weights, where there is a key.
FF_DEVICE float inverse(float sum) { return sum == 0.0f ? 0.0f : reciprocal(sum); }

// Eight neighbours of a row of the output, as far as they are there.
template <class T>
FF_DEVICE void store_chunk(T* to, const Chunk& chunk, int left) {
  if (left >= 8 && reinterpret_cast<size_t>(to) % 16 == 0) {
    *reinterpret_cast<Chunk*>(to) = chunk;
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < left) to[e] = T{uint16_t(chunk.words[e / 2] >> e % 2 * 16)};
}

// Rows `row` .. row + 16 of weighted values over their sums of weights, of `count` rows in all. By
// way of 16 rows of shared memory that are this warp's from `place` on: stores of whole chunks, and
// what is not aligned is a short loop.
template <class T, int kDim>
FF_DEVICE void store_means(const SharedTile<T, kDim>& scratch, int place, const MutableView& to,
                           int64_t b, int64_t h, int row, int count, int dim, const float (&sum)[2],
                           const float (&out)[kDim / 8][4]) {
  constexpr int kChunks = SharedTile<T, kDim>::kChunks;
  const int lane = lane_index();
  const Reader<T, kDim> own(scratch, place + lane / 4, 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float factor = inverse(sum[r]);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      *reinterpret_cast<uint32_t*>(const_cast<T*>(own.at(r * 8, d)) + lane % 4 * 2) =
          pack<T>(out[d][2 * r] * factor, out[d][2 * r + 1] * factor);
  }
  barrier_warp();
  T* const values = output_row<T>(to, b, h, row);
#pragma unroll 1
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int above = i / kChunks, column = i % kChunks * 8;
    if (row + above >= count || column >= dim) continue;
    store_chunk(values + above * to.row + column,
                *reinterpret_cast<const Chunk*>(scratch.chunk(place + above, i % kChunks)),
                dim - column);
  }
}

FF_DEVICE void store_lse(const MutableLse& lse, int64_t b, int64_t h, int64_t i, float value) {
  if (lse.data) lse.data[b * lse.batch + h * lse.head + i * lse.row] = value;
}

// Calls body<kDim>() for the class of a call.
template <class Body>
const char* with_dim(int dim, const Body& body) {
  switch (dim) {
    case 32:
      return body.template operator()<32>();
    case 64:
      return body.template operator()<64>();
    case 128:
      return body.template operator()<128>();
    case 192:
      return body.template operator()<192>();
    case 256:
      return body.template operator()<256>();
    default:
      return "head dims above 256 have no kernel";
  }
}

}  // namespace
}  // namespace ff::cuda
