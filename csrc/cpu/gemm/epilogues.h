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

// `epilogue` of the sum of a product and what stands in `before`.
template <class Epilogue>
struct AddTo {
  const float* before;
  int64_t stride;
  const Epilogue& epilogue;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
    Vec total[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        total[r][n] = Vec::load(before + (row + r) * stride + column + n * Vec::kLanes) + sum[r][n];
    epilogue(row, column, total);
  }
};

}  // namespace
}  // namespace ff
