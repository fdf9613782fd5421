// Tiles of rows in shared memory, and what a warp makes of them on tensor cores.
//
// A warp owns 16 rows of scores. Of each 16x8 tile a lane holds four: rows lane / 4 and that + 8,
// columns lane % 4 * 2 and the next.
#pragma once

#include <cstddef>

#include "../calls.h"
#include "device.h"
#include "diagonal.h"

namespace ff::cuda {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

// Rows of kDim 16-bit values. Their 16-byte chunks are permuted so that the same chunk of eight
// rows in sequence lies in all 32 banks, as the loads of matrices want it.
template <class T, int kDim>
struct Tile {
  static_assert(kDim == 32 || kDim % 64 == 0);
  static constexpr int kChunks = kDim / 8;

  T* data;

  FF_DEVICE static int turned(int row, int chunk) {
    return chunk ^ (kChunks == 4 ? row >> 1 & 3 : row & 7);
  }
  FF_DEVICE T* chunk(int row, int chunk) const {
    return data + row * kDim + turned(row, chunk) * 8;
  }
};

// The last coordinate of a flat index, which is left without it. In 32 bits, as a grid's size has:
// in 64 a division is a function call.
FF_DEVICE int take_last(uint32_t& index, int64_t count) {
  const uint32_t size = uint32_t(count), last = index % size;
  index /= size;
  return int(last);
}

// The key head of a query head.
FF_DEVICE int kv_head_of(const Attention& p, int h) {
  return h / int(uint32_t(p.heads) / uint32_t(p.kv_heads));
}

// One head of an operand: `count` rows of `dim` adjacent values.
template <class T>
struct Head {
  const T* data;
  int64_t stride;
  int count, dim;
  // Rows are whole chunks of 16 bytes, begin at multiples of that, and lie less than 2 GiB apart: a
  // product of 64 bits would be five instructions.
  bool chunked;

  FF_DEVICE Head(const View& view, int64_t b, int64_t h, int64_t count, int64_t dim)
      : data(static_cast<const T*>(view.data) + b * view.batch + h * view.head),
        stride(view.row),
        count(int(count)),
        dim(int(dim)),
        chunked(reinterpret_cast<size_t>(data) % 16 == 0 && (int(stride) | int(dim)) % 8 == 0 &&
                size_t(stride) < 1 << 30) {}
};

// Flags of hidden keys of a batch entry, or none.
struct Padding {
  const Bool* data = nullptr;
  int64_t stride = 0;

  FF_DEVICE Padding(const Bool* all, int64_t batch, int64_t column, int64_t b)
      : data(all ? all + b * batch : nullptr), stride(column) {}
  FF_DEVICE bool hides(int i) const { return data && data[i * stride]; }
};

// load_rows of a head of chunks, 16 bytes a copy. Up to eight lanes have a row, and a thread the
// same chunks of every step-th one, so that its addresses and limits are a few sums: 9 instructions
// a copy of 64 columns on sm_90, where a loop over single chunks takes 43.
template <bool kEven, class T, int kDim>
FF_DEVICE void copy_rows(const Tile<T, kDim>& tile, const Head<T>& from, const Padding& padding,
                         int first, int rows, uint32_t thread, uint32_t threads) {
  constexpr int kChunks = Tile<T, kDim>::kChunks, kLanes = kChunks < 8 ? kChunks : 8;
  constexpr int kBatch = 4;  // rows of a thread whose flags are on their way at once
  const int step = int(threads / kLanes), row = int(thread / kLanes), chunk = int(thread % kLanes);
  // Rows are counted from the thread's own where all threads have as many: then the same are there.
  int i = kEven ? 0 : row;
  const int origin = first + row - i, left = from.dim - chunk * 8;
  const int limit = left > 0 ? from.count - origin : 0;
  const int stride = int(from.stride) * int(sizeof(T));
  // A number: it may stand beyond the rows, where nothing is read.
  size_t source = reinterpret_cast<size_t>(from.data) + size_t(int64_t(first + row) * stride) +
                  size_t(chunk * 16);
  // Two steps are a multiple of eight rows, after which the order of chunks repeats.
  T* to[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    to[k] = tile.data + (row + k * step) * kDim + tile.turned(row % 8 + k * step % 8, chunk) * 8;
  for (; i < rows; i += kBatch * step) {
    uint32_t hidden = 0;
    if (padding.data) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (i + k * step < rows && i + k * step < limit && padding.hides(origin + i + k * step))
          hidden |= 1u << k;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const bool valid = i + k * step < limit && !(hidden >> k & 1);
      if (i + k * step < rows) {
#pragma unroll 2  // all four of 256 columns would spill on sm_75, in registers, and on sm_100
        for (int c = 0; c < kChunks; c += kLanes)
          copy_async16(to[k % 2] + c * 8, reinterpret_cast<const void*>(source + c * 16),
                       valid && (c == 0 || c * 8 < left));
      }
      source += size_t(int64_t(step) * stride);
      to[k % 2] += 2 * step * kDim;
    }
  }
}

// Rows first .. first + rows of a head into a tile, zeros where there are none or `padding` hides
// them, by `threads` threads, whole warps, of which this is number `thread`; kEven: a constant
// number that all have as many chunks of, in as many rows. Asynchronous in part.
template <bool kEven = false, class T, int kDim>
FF_DEVICE void load_rows(const Tile<T, kDim>& tile, const Head<T>& from, const Padding& padding,
                         int first, int rows, int thread, int threads) {
  if (from.chunked)
    return copy_rows<kEven>(tile, from, padding, first, rows, uint32_t(thread), uint32_t(threads));
  constexpr int kChunks = Tile<T, kDim>::kChunks;
#pragma unroll 1
  for (int i = thread; i < rows * kChunks; i += threads) {
    const int row = first + i / kChunks, column = i % kChunks * 8;
    const int left = row < from.count && !padding.hides(row) ? from.dim - column : 0;
    T* to = tile.chunk(i / kChunks, i % kChunks);
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = e < left ? from.data[row * from.stride + column + e] : T{0};
  }
}

// scores[n] = rows `row` .. row + 16 of `query` times keys first + 8 n .. of `key`, for n < tiles.
template <class T, int kDim, int kTiles>
FF_DEVICE void multiply_scores(const Tile<T, kDim>& query, int row, const Tile<T, kDim>& key,
                               int first, int tiles, float (&scores)[kTiles][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < kDim / 8; chunk += 4) {
    uint32_t a[2][4];
    load_matrix4(a[0], query.chunk(row + lane % 16, chunk + lane / 16));
    load_matrix4(a[1], query.chunk(row + lane % 16, chunk + 2 + lane / 16));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= tiles) continue;
      uint32_t b[4];
      load_matrix4(b, key.chunk(first + n * 8 + lane % 8, chunk + lane / 8));
      mma<T>(scores[n], a[0], b[0], b[1]);
      mma<T>(scores[n], a[1], b[2], b[3]);
    }
  }
}

// A 16x16 tile of weights as the left operand.
template <class T>
FF_DEVICE void left_operand(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = pack<T>(low[0], low[1]), a[1] = pack<T>(low[2], low[3]);
  a[2] = pack<T>(high[0], high[1]), a[3] = pack<T>(high[2], high[3]);
}

// out += a times rows first .. first + 16 of `value`.
template <class T, int kDim>
FF_DEVICE void add_product(const uint32_t (&a)[4], const Tile<T, kDim>& value, int first,
                           float (&out)[kDim / 8][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int d = 0; d < kDim / 8; d += 2) {
    uint32_t b[4];
    load_matrix4_transposed(b, value.chunk(first + lane % 16, d + lane / 16));
    mma<T>(out[d], a, b[0], b[1]);
    mma<T>(out[d + 1], a, b[2], b[3]);
  }
}

// out += weights of kTiles * 8 keys, of which `tiles` are there, times their values.
template <class T, int kDim, int kTiles>
FF_DEVICE void add_values(const float (&weights)[kTiles][4], int tiles, const Tile<T, kDim>& value,
                          int first, float (&out)[kDim / 8][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; n += 2) {
    if (n >= tiles) continue;
    uint32_t a[4];
    left_operand<T>(weights[n], weights[n + 1], a);
    add_product(a, value, first + n * 8, out);
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

// The maximum with 0 in place of -inf, a row without a key so far: -inf - -inf would be NaN.
FF_DEVICE float finite(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// From products of queries and keys to exponents of e: of 2, a mask of finfo.min or a large scale
// would overflow. Products with the scale are rounded, as their maximum is, so that none exceeds
// it.
struct Exponents {
  const void* mask;  // of this batch entry and head
  int64_t row, column;
  Type type;
  Padding padding;
  float scale;
  Diagonal diagonal;
  int q_len, kv_len;

  FF_DEVICE Exponents(const Attention& p, int64_t b, int64_t h)
      : mask(p.mask.data),
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

  // Of a single score.
  FF_DEVICE float operator()(float product, int query, int key) const {
    const float x = rounded_product(product, scale);
    if (key >= kv_len || diagonal.hides(query, key) || padding.hides(key)) return -kInfinity;
    if (!mask || query >= q_len) return x;
    const int64_t at = query * row + key * column;
    if (type == Type::kBool) return static_cast<const Bool*>(mask)[at] ? x : -kInfinity;
    if (type == Type::kFloat32) return x + static_cast<const float*>(mask)[at];
    if (type == Type::kFloat16) return x + to_float(static_cast<const Half*>(mask)[at]);
    return x + to_float(static_cast<const BFloat16*>(mask)[at]);
  }

  // Of a lane's scores: rows `query` and query + 8, keys from `first` on.
  template <int kTiles>
  FF_DEVICE void apply(int query, int first, float (&scores)[kTiles][4]) const {
    const int lane_query = query + lane_index() / 4, lane_key = first + lane_index() % 4 * 2;
    const bool all = !mask && !padding.data && first + 8 * kTiles <= kv_len &&
                     !diagonal.crosses(query, 16, first, 8 * kTiles);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[n][i] =
            all ? rounded_product(scores[n][i], scale)
                : (*this)(scores[n][i], lane_query + i / 2 * 8, lane_key + n * 8 + i % 2);
  }

  FF_DEVICE float power(float exponent, float maximum) const {
    return exp2((exponent - maximum) * kLog2E);
  }

  // -inf for a row without a key.
  FF_DEVICE float log_sum(float maximum, float sum) const {
    return sum == 0.0f ? -kInfinity : maximum + logf(sum);
  }
};

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

// Rows `row` .. row + 16 of weighted values over their sums of weights, of `count` rows in all.
template <class T, int kDim>
FF_DEVICE void store_means(const MutableView& to, int64_t b, int64_t h, int row, int count, int dim,
                           const float (&sum)[2], const float (&out)[kDim / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = row + lane_index() / 4 + r * 8;
    if (i >= count) continue;
    const float factor = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
    T* const values = output_row<T>(to, b, h, i);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d)
      store_pair(values, d * 8 + lane_index() % 4 * 2, dim, out[d][2 * r] * factor,
                 out[d][2 * r + 1] * factor);
  }
}

FF_DEVICE void store_lse(const MutableLse& lse, int64_t b, int64_t h, int64_t i, float value) {
  if (lse.data) lse.data[b * lse.batch + h * lse.head + i * lse.row] = value;
}

// The class of head dims that kernels are made for.
inline int padded_dim(int64_t head_dim, int64_t value_dim) {
  const int64_t dim = head_dim > value_dim ? head_dim : value_dim;
  return dim <= 32 ? 32 : int((dim + 63) / 64 * 64);
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
