// Projections of the cross-attention layer: their description, and rows of the input, normalised,
// in shared memory.
#pragma once

#include "api.h"
#include "cuda/shared_tile.cuh"

namespace ff::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kColumns = 32;      // of the output that a warp sums up
constexpr int kStep = 32;         // values of a row that a warp takes at once
constexpr int kPartStride = 40;   // of rows of partial sums: each begins 8 banks further
constexpr int kMostSplit = 1024;  // blocks of 32 columns

// Rows are those of all batch entries in sequence.
struct Projection {
  Sequence x;
  int rows = 0, length = 1, width = 0;  // `length` rows to a batch entry
  Norm norm;
  Linear linear;
  int features = 0;
  Sequence residual;
  void* out = nullptr;  // (rows, features)

  // Of a row in shared memory: a multiple of eight.
  constexpr int chunks() const { return (width + 63) / 64 * 8; }

  template <class T>
  FF_DEVICE const T* row(const Sequence& of, int i) const {
    return static_cast<const T*>(of.data) + i / length * of.batch + i % length * of.row;
  }
};

// Of `rows` rows: first as operands, then as partial sums.
constexpr int row_chunks(const Projection& p, int rows) {
  const int parts = kWarps * kPartStride / 4;
  return rows * (p.chunks() > parts ? p.chunks() : parts);
}

inline int projection_bytes(const Projection& p, int rows) {
  const int norm = p.norm.kind == NormKind::kNone ? 0 : p.chunks();
  return shared_bytes<Chunk>(row_chunks(p, rows)) + 2 * shared_bytes<Chunk>(norm);
}

inline bool in_chunks(const void* data, int64_t strides) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides % 8 == 0;
}

// Whether all rows consist of 16 bytes that are aligned.
inline bool in_chunks(const Projection& p) {
  return in_chunks(p.x.data, p.x.batch | p.x.row | p.width) && in_chunks(p.linear.weight, 0) &&
         in_chunks(p.norm.weight, 0) && in_chunks(p.norm.bias, 0);
}

// Values column .. column + 8 of a row of `width`, zeros beyond it.
template <bool kAligned, class T>
FF_DEVICE Chunk load_chunk(const T* row, int column, int width) {
  Chunk chunk{};
  if constexpr (kAligned) {
    if (column < width) chunk = *reinterpret_cast<const Chunk*>(row + column);
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (column + e < width) chunk.words[e / 2] |= uint32_t(row[column + e].bits) << e % 2 * 16;
  }
  return chunk;
}

// The same into shared memory; asynchronous where rows are aligned.
template <bool kAligned, class T>
FF_DEVICE void fetch_chunk(Chunk* to, const T* row, int column, int width) {
  if constexpr (kAligned) {
    copy_async16(to, row + (column < width ? column : 0), column < width);
  } else {
    *to = load_chunk<false>(row, column, width);
  }
}

// Rows in shared memory. Every second one has the halves of 128 bytes exchanged, so that the same
// four chunks of two rows lie in all banks.
struct RowTile {
  Chunk* data;
  int chunks;

  FF_DEVICE Chunk* chunk(int row, int chunk) const {
    return data + row * chunks + (chunk ^ (row & 1) * 4);
  }
};

// Over lanes in sequence.
template <int kLanes>
FF_DEVICE float sum_lanes(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Rows of the input and their norm, loaded by all threads of a block: a thread has each kLanes-th
// chunk of one row.
template <class T, int kRows, bool kAligned>
struct Input {
  static constexpr int kLanes = kThreads / kRows;
  RowTile rows;
  Chunk *weight = nullptr, *bias = nullptr;  // of the norm, if there is one
  int row = thread_index() / kLanes, lane = thread_index() % kLanes;

  // Starts to load rows first .. first + count, and zeros behind them.
  FF_DEVICE Input(const Projection& p, int first, int count) {
    Shared shared;
    rows = {shared.take<Chunk>(row_chunks(p, kRows)), p.chunks()};
    const T* const source = p.row<T>(p.x, row < count ? first + row : first);
    for (int c = lane; c < rows.chunks; c += kLanes)
      fetch_chunk<kAligned>(rows.chunk(row, c), source, c * 8, row < count ? p.width : 0);
    if (p.norm.kind != NormKind::kNone) {
      weight = shared.take<Chunk>(rows.chunks), bias = shared.take<Chunk>(rows.chunks);
      fetch_vector(weight, p.norm.weight, 1.0f, p.width);
      fetch_vector(bias, p.norm.bias, 0.0f, p.width);
    }
    commit_copies();
  }

  // Until all threads may read the rows, normalised.
  FF_DEVICE void finish(const Projection& p) const {
    wait_copies<0>();
    barrier();
    if (p.norm.kind != NormKind::kNone) {
      normalize(p.norm, p.width);
      barrier();
    }
  }

  // Where there is no such vector, it is `otherwise` everywhere.
  FF_DEVICE void fetch_vector(Chunk* to, const void* from, float otherwise, int width) const {
    const uint32_t both = pack<T>(otherwise, otherwise);
    for (int c = thread_index(); c < (width + 7) / 8; c += kThreads) {
      if (from) {
        fetch_chunk<kAligned>(to + c, static_cast<const T*>(from), c * 8, width);
      } else {
        to[c] = {both, both, both, both};
      }
    }
  }

  FF_DEVICE void normalize(const Norm& norm, int width) const {
    const int chunks = (width + 7) / 8;
    // Of aligned rows all chunks are whole. Beyond the others values stay 0, as weights are.
    const auto inside = [=](int column) { return kAligned || column < width; };
    float mean = 0.0f, squares = 0.0f;
    if (norm.kind == NormKind::kLayer) {
      for (int c = lane; c < chunks; c += kLanes) {
        const Chunk x = *rows.chunk(row, c);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += low<T>(x.words[w]) + high<T>(x.words[w]);
        mean += sum;
      }
      mean = sum_lanes<kLanes>(mean) / float(width);
    }
    for (int c = lane; c < chunks; c += kLanes) {
      const Chunk x = *rows.chunk(row, c);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float first = low<T>(x.words[w]) - mean, second = high<T>(x.words[w]) - mean;
        if (inside(c * 8 + w * 2)) sum += first * first;
        if (inside(c * 8 + w * 2 + 1)) sum += second * second;
      }
      squares += sum;
    }
    const float factor = 1.0f / sqrtf(sum_lanes<kLanes>(squares) / float(width) + norm.eps);
    for (int c = lane; c < chunks; c += kLanes) {
      Chunk x = *rows.chunk(row, c);
      const Chunk scale = weight[c], shift = bias[c];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float first = (low<T>(x.words[w]) - mean) * factor;
        float second = (high<T>(x.words[w]) - mean) * factor;
        first = first * low<T>(scale.words[w]) + low<T>(shift.words[w]);
        second = second * high<T>(scale.words[w]) + high<T>(shift.words[w]);
        x.words[w] = pack<T>(inside(c * 8 + w * 2) ? first : 0.0f,
                             inside(c * 8 + w * 2 + 1) ? second : 0.0f);
      }
      *rows.chunk(row, c) = x;
    }
  }
};

}  // namespace
}  // namespace ff::cuda
