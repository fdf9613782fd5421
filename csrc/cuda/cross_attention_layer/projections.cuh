// Projections of few rows, out = norm(x) W^T + bias + residual: for latency, and bound by how fast
// weights arrive. A block has 16 or 32 rows in shared memory, whole, and 32 columns of the output.
// Its warps cut the width between them, so that all its weights, 48 KB at 768 wide, are on their
// way at once. Where that gives more blocks than any GPU runs at a time, each warp has 32 columns
// of its own instead, and adds up the same parts in the same order.
//
// Weights go from global memory to tensor cores as they lie. The four lanes that share a row of an
// operand take 16 bytes of it each, for both halves of two products: a permutation of the 32 values
// that a step adds up, the same for both operands.
//
// Not fewer launches: with the output projection behind the attention of its head, a block would
// wait 1 us for 96 KB of weights (a processor reads 100 GB/s), one processor in ten would work, and
// partial sums would be left to add. A launch in a graph costs about as much, and its blocks half.
#pragma once

#include <cstring>

#include "rows.cuh"

namespace ff::cuda {
namespace {

// A lane's weights of a step: of every eighth of 32 columns from `first` on.
template <bool kAligned, class T>
FF_DEVICE void load_weights(const Projection& p, int first, int step,
                            Chunk (&weights)[kColumns / 8]) {
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int feature = first + j * 8 + lane_index() / 4;
    const T* const row = static_cast<const T*>(p.linear.weight) + int64_t(feature) * p.width;
    weights[j] = load_chunk<kAligned>(row, step * kStep + lane_index() % 4 * 8,
                                      feature < p.features ? p.width : 0);
  }
}

// sums += a step of `count` rows times weights.
template <class T, int kTiles>
FF_DEVICE void multiply_step(const RowTile& rows, int count, int step,
                             const Chunk (&weights)[kColumns / 8],
                             float (&sums)[kTiles][kColumns / 8][4]) {
  const int row = lane_index() / 4, chunk = step * 4 + lane_index() % 4;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (t * 16 >= count) continue;
    const Chunk top = *rows.chunk(t * 16 + row, chunk), low = *rows.chunk(t * 16 + row + 8, chunk);
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      const uint32_t a[4] = {top.words[half], low.words[half], top.words[half + 1],
                             low.words[half + 1]};
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
        mma<T>(sums[t][j], a, weights[j].words[half], weights[j].words[half + 1]);
    }
  }
}

// A row of the output.
template <class T>
struct OutputRow {
  const T *bias, *residual;
  T* out;
  int features;  // 0 where there is no row

  FF_DEVICE OutputRow(const Projection& p, int i)
      : bias(static_cast<const T*>(p.linear.bias)),
        residual(p.residual.data ? p.row<T>(p.residual, i) : nullptr),
        out(static_cast<T*>(p.out) + int64_t(i) * p.features),
        features(i < p.rows ? p.features : 0) {}

  // What is added to the sum of a column.
  FF_DEVICE float addend(int column) const {
    if (column >= features) return 0.0f;
    return (bias ? to_float(bias[column]) : 0.0f) + (residual ? to_float(residual[column]) : 0.0f);
  }

  FF_DEVICE void store(int column, float first, float second) const {
    store_pair(out, column, features, first, second);
  }
};

// One of two kernel arguments, word by word: a pointer to them would copy both to local memory.
FF_DEVICE Projection pick(bool first, const Projection& a, const Projection& b) {
  static_assert(sizeof(Projection) % 8 == 0);
  uint64_t words[sizeof(Projection) / 8], others[sizeof(Projection) / 8];
  std::memcpy(words, &a, sizeof words), std::memcpy(others, &b, sizeof others);
#pragma unroll
  for (size_t i = 0; i < sizeof words / 8; ++i) words[i] = first ? words[i] : others[i];
  Projection picked;
  std::memcpy(&picked, words, sizeof words);
  return picked;
}

// Of each 16x8 tile of sums a lane has rows lane / 4 and that + 8, two columns of both.
template <int kTiles>
using Sums = float[kTiles][kColumns / 8][4];

template <int kTiles>
FF_DEVICE void move_sums(Sums<kTiles>& from, Sums<kTiles>& total) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[t][j][i] += from[t][j][i], from[t][j][i] = 0.0f;
}

// Two projections, one behind the other; kSplit: the warps of a block share its columns.
template <class T, int kTiles, bool kSplit, bool kAligned>
FF_KERNEL(kThreads)
project(const Projection first, const Projection second, const int64_t blocks_of_first) {
  if constexpr (has_mma<T>()) {
    constexpr int kRows = kTiles * 16, kDepth = kSplit ? 3 : 2;
    const bool is_first = block_index() < blocks_of_first;
    const Projection p = pick(is_first, first, second);
    const int block = int(block_index() - (is_first ? 0 : blocks_of_first));
    const int tiles = (p.rows + kRows - 1) / kRows, first_row = block % tiles * kRows;
    const int count = p.rows - first_row < kRows ? p.rows - first_row : kRows;
    const int warp = warp_index(), thread = thread_index();
    const int first_column = kColumns * (kSplit ? block / tiles : block / tiles * kWarps + warp);

    const Input<T, kRows, kAligned> input(p, first_row, count);

    // Parts of so many steps are added up by themselves: this warp's, or one after another.
    const int steps = (p.width + kStep - 1) / kStep, part = (steps + kWarps - 1) / kWarps;
    const int begin = kSplit ? warp * part : 0;
    const int end = kSplit && begin + part < steps ? begin + part : steps;
    Chunk fetched[kDepth][kColumns / 8];
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
      if (begin + d < end) load_weights<kAligned, T>(p, first_column, begin + d, fetched[d]);

    // Where warps share columns, this thread puts the parts of a pair in each 16 rows together.
    const int pair_row = thread / (kColumns / 2), pair_column = thread % (kColumns / 2) * 2;
    float addends[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        addends[t][e] = kSplit ? OutputRow<T>(p, first_row + t * 16 + pair_row)
                                     .addend(first_column + pair_column + e)
                               : 0.0f;

    input.finish(p);
    Sums<kTiles> sums, total;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) clear(sums[t]), clear(total[t]);
    int left = part;  // steps of the part
    for (int at = begin; at < end; at += kDepth) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        const int step = at + d;
        if (step >= end) continue;
        if (!kSplit && left-- == 0) move_sums<kTiles>(sums, total), left = part - 1;
        multiply_step<T>(input.rows, count, step, fetched[d], sums);
        if (step + kDepth < end)
          load_weights<kAligned, T>(p, first_column, step + kDepth, fetched[d]);
      }
    }

    const int row = lane_index() / 4, column = lane_index() % 4 * 2;
    if constexpr (kSplit) {
      float* const parts = reinterpret_cast<float*>(input.rows.data);
      const auto place = [&](int of_warp, int of_row, int of_column) {
        return parts + (of_warp * kRows + of_row) * kPartStride + of_column;
      };
      barrier();  // nobody reads rows any more
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            place(warp, t * 16 + row + i / 2 * 8, j * 8 + column)[i % 2] = sums[t][j][i];
      barrier();
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        float pair[2] = {};
#pragma unroll
        for (int w = 0; w < kWarps; ++w)
#pragma unroll
          for (int e = 0; e < 2; ++e) pair[e] += place(w, t * 16 + pair_row, pair_column)[e];
        OutputRow<T>(p, first_row + t * 16 + pair_row)
            .store(first_column + pair_column, pair[0] + addends[t][0], pair[1] + addends[t][1]);
      }
    } else {
      move_sums<kTiles>(sums, total);
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const OutputRow<T> to(p, first_row + t * 16 + row + r * 8);
#pragma unroll
          for (int j = 0; j < kColumns / 8; ++j) {
            const int at = first_column + j * 8 + column;
            to.store(at, total[t][j][2 * r] + to.addend(at),
                     total[t][j][2 * r + 1] + to.addend(at + 1));
          }
        }
    }
  }
}

inline int64_t projection_blocks(const Projection& p, int rows, int columns) {
  return int64_t((p.rows + rows - 1) / rows) * ((p.features + columns - 1) / columns);
}

// In one launch; null, or what is wrong.
template <class T>
const char* run_projections(const Projection& first, const Projection& second, int capability,
                            void* stream) {
  const auto bytes = [&](int rows) {
    const int one = projection_bytes(first, rows), other = projection_bytes(second, rows);
    return one > other ? one : other;
  };
  const auto run = [&]<int kTiles, bool kSplit, bool kAligned>() {
    constexpr int kRows = kTiles * 16, kWide = kSplit ? kColumns : kColumns * kWarps;
    const int64_t blocks = projection_blocks(first, kRows, kWide);
    const Launch size{blocks + projection_blocks(second, kRows, kWide), kThreads, bytes(kRows),
                      stream};
    return launch<project<T, kTiles, kSplit, kAligned>>(size, first, second, blocks);
  };
  const auto run_rows = [&]<int kTiles>() {
    const int64_t blocks = projection_blocks(first, kTiles * 16, kColumns) +
                           projection_blocks(second, kTiles * 16, kColumns);
    if (!in_chunks(first) || !in_chunks(second))
      return run.template operator()<kTiles, true, false>();
    return blocks <= kMostSplit ? run.template operator()<kTiles, true, true>()
                                : run.template operator()<kTiles, false, true>();
  };
  const int limit = shared_limit(capability);
  if (bytes(32) <= limit) return run_rows.template operator()<2>();
  if (bytes(16) <= limit) return run_rows.template operator()<1>();
  return "rows are too wide for the shared memory of the device";
}

}  // namespace
}  // namespace ff::cuda
