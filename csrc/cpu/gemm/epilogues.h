// Epilogues: what becomes of a register tile that is summed up, before it leaves the registers.
// They take the sums of rows `row` to `row + R` and of N registers of columns from `column` on.
#pragma once

#include <cstdint>

namespace ff {
namespace {

// to = product.
struct Store {
  float* to;
  int64_t stride;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        sum[r][n].store(to + (row + r) * stride + column + n * Vec::kLanes);
  }
};

// Stores, and takes the maximum of every column. A NaN is passed over.
struct StoreMaximum {
  float* to;
  int64_t stride;
  float* maximum;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int64_t lane = column + n * Vec::kLanes;
      Vec largest = Vec::load(maximum + lane);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sum[r][n].store(to + (row + r) * stride + lane);
        largest = Vec::max(sum[r][n], largest);
      }
      largest.store(maximum + lane);
    }
  }
};

// to = to + product, or the product alone if it is the first.
struct Add {
  float* to;
  int64_t stride;
  bool first = false;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    if (first) return Store{to, stride}(row, column, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = to + (row + r) * stride + column + n * Vec::kLanes;
        (Vec::load(at) + sum[r][n]).store(at);
      }
  }
};

// to = to * factor[row] + product, or the product alone if it is the first.
struct Rescale {
  float* to;
  int64_t stride;
  const float* factor;
  bool first;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    if (first) return Store{to, stride}(row, column, sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec scale = Vec::set(factor[row + r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        float* at = to + (row + r) * stride + column + n * Vec::kLanes;
        Vec::fma(Vec::load(at), scale, sum[r][n]).store(at);
      }
    }
  }
};

// The same with a factor for every column.
struct RescaleColumns {
  float* to;
  int64_t stride;
  const float* factor;
  bool first;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    if (first) return Store{to, stride}(row, column, sum);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const int64_t lane = column + n * Vec::kLanes;
      const Vec scale = Vec::load(factor + lane);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* at = to + (row + r) * stride + lane;
        Vec::fma(Vec::load(at), scale, sum[r][n]).store(at);
      }
    }
  }
};

// An epilogue of sums that stand in memory, one register of them after the other: of products that
// are put together there it costs 2 % of a call, and register tiles of their own, compiled for
// every size, were a fifth of all.
template <class Epilogue>
void finish(const float* sums, int64_t rows, int64_t columns, const Epilogue& epilogue) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; column += Vec::kLanes) {
      const Vec sum[1][1] = {{Vec::load(sums + row * columns + column)}};
      epilogue(row, column, sum);
    }
  }
}

}  // namespace
}  // namespace ff
