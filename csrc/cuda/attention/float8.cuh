// Rows of 8-bit floats on their way to shared memory, where they lie as 16-bit numbers, which hold
// them exactly: products are those of other calls. Their scales are factors of scores and outputs.
#pragma once

#include "cuda/softmax.cuh"

namespace ff::cuda {
namespace {

// The scale of scores of query head h; those of 8-bit keys have their own.
template <class Scores>
FF_DEVICE float score_scale(const typename Scores::Call& p, int b, int h) {
  if constexpr (Scores::kFloat8) {
    if (p.key_scales.data) return p.scale * p.key_scales.at(b, kv_head_of(p, h));
  }
  return p.scale;
}

// Sums of weighted values times the scale of the values.
template <class Scores, int kTiles>
FF_DEVICE void apply_value_scale(const typename Scores::Call& p, int b, int h,
                                 float (&out)[kTiles][4]) {
  if constexpr (Scores::kFloat8) {
    if (!p.value_scales.data) return;
    const float scale = p.value_scales.at(b, kv_head_of(p, h));
#pragma unroll
    for (int d = 0; d < kTiles; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] *= scale;
  }
}

// Eight of them, those behind the first `left` as zeros.
FF_DEVICE uint64_t load_eight(const uint8_t* from, int left, bool aligned) {
  if (left >= 8 && aligned) return *reinterpret_cast<const uint64_t*>(from);
  uint64_t bytes = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (e < left) bytes |= uint64_t(from[e]) << 8 * e;
  return bytes;
}

// Up to 64 rows of `dim` numbers of a head, those from `first` on, by so many threads; zeros where
// the row's bit in `present` is not set. They are there behind the next barrier.
template <class T, int kDim>
FF_DEVICE void load_float8(const View& view, int b, int h, int dim, int first,
                           const SharedTile<T, kDim>& tile, int rows, uint64_t present, int thread,
                           int threads) {
  constexpr int kChunks = SharedTile<T, kDim>::kChunks, kBatch = 4;  // loads on their way at once
  const uint8_t* const from =
      static_cast<const uint8_t*>(view.data) + b * view.batch + h * view.head + first * view.row;
  const bool aligned = (reinterpret_cast<size_t>(from) | size_t(view.row)) % 8 == 0;
#pragma unroll 1
  for (int start = thread; start < rows * kChunks; start += kBatch * threads) {
    uint64_t bytes[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = start + k * threads, row = i / kChunks, column = i % kChunks * 8;
      const bool there = i < rows * kChunks && present >> row & 1;
      bytes[k] = load_eight(from + row * view.row + column, there ? dim - column : 0, aligned);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = start + k * threads;
      if (i >= rows * kChunks) break;
      Chunk chunk;
#pragma unroll
      for (int w = 0; w < 4; ++w) chunk.words[w] = unpack_float8<T>(uint16_t(bytes[k] >> 16 * w));
      *reinterpret_cast<Chunk*>(tile.chunk(i / kChunks, i % kChunks)) = chunk;
    }
  }
}

}  // namespace
}  // namespace ff::cuda
