// What the attention kernels are made of: matrix products, rows of operands, masked scores,
// softmax.
//
// Everything here is written once over Vec and compiled once per instruction set; the anonymous
// namespace keeps the linker from replacing baseline code by code for a newer machine.
//
// A row's result must not depend on its neighbours, on threads or on where a tile ends: each
// element has one chain of fused multiply-adds in ascending order, whatever tile computes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "convert.h"
#include "kernels.h"

namespace ff {
namespace {

constexpr int64_t kPanel = 48;   // queries of a task
constexpr int64_t kBlock = 256;  // keys in one accumulation chain: longer ones lose accuracy
constexpr int64_t kFew = 3;      // queries that are served one at a time
constexpr float kInfinity = __builtin_inff();

inline int64_t padded(int64_t n) { return (n + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes; }

// exp(x) for x <= 0 (a little above is fine), 0 below -87.3 where float32 ends; NaN stays.
// 2^f by the degree-6 minimax polynomial on [-1/2, 1/2], relative error 2e-08: degree 5 would
// add its 1.1e-7 to roundings of 6e-8, which shows where a softmax has a handful of keys.
inline Vec exp(Vec x) {
  const Vec n = Vec::round(Vec::max(Vec::set(-126.0f), x * Vec::set(1.44269504f)));
  // log2(e) in two parts: a single constant costs 2e-7 at x = -5.
  const Vec f = Vec::fma(x, Vec::set(1.925962989e-8f),
                         Vec::fma(x, Vec::set(1.44269502162933349609375f), Vec::zero() - n));
  Vec p = Vec::set(1.535336196e-04f);
  p = Vec::fma(p, f, Vec::set(1.339887502e-03f));
  p = Vec::fma(p, f, Vec::set(9.618436918e-03f));
  p = Vec::fma(p, f, Vec::set(5.550332367e-02f));
  p = Vec::fma(p, f, Vec::set(2.402264774e-01f));
  p = Vec::fma(p, f, Vec::set(6.931471825e-01f));
  p = Vec::fma(p, f, Vec::set(1.0f));
  return Vec::zero_below(x, Vec::set(-87.3f), Vec::scale(p, n));
}

// C[r][c] (+)= sum_k A[r * a_row + k * a_k] * B[k][c] for R rows and N vectors of columns.
template <int R, int N>
void multiply_tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
                   int64_t depth, float* c, int64_t ldc, bool accumulate) {
  Vec sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = Vec::zero();
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = Vec::load(b + k * ldb + n * Vec::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = Vec::set(a[r * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = Vec::fma(x, row[n], sum[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* to = c + r * ldc + n * Vec::kLanes;
      (accumulate ? Vec::load(to) + sum[r][n] : sum[r][n]).store(to);
    }
}

template <int R, int N>
void multiply_rest(int64_t rows, const float* a, int64_t a_row, int64_t a_k, const float* b,
                   int64_t ldb, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  if constexpr (R > 0) {
    if (rows == R) {
      multiply_tile<R, N>(a, a_row, a_k, b, ldb, depth, c, ldc, accumulate);
    } else {
      multiply_rest<R - 1, N>(rows, a, a_row, a_k, b, ldb, depth, c, ldc, accumulate);
    }
  }
}

template <int N>
void multiply_columns(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
                      int64_t rows, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  // As many accumulators as leave registers for N columns and one broadcast.
  constexpr int kRows = (Vec::kRegisters - N - 1) / N < 12 ? (Vec::kRegisters - N - 1) / N : 12;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    multiply_tile<kRows, N>(a + r * a_row, a_row, a_k, b, ldb, depth, c + r * ldc, ldc, accumulate);
  }
  multiply_rest<kRows - 1, N>(rows - r, a + r * a_row, a_row, a_k, b, ldb, depth, c + r * ldc, ldc,
                              accumulate);
}

// C (+)= A B, columns a multiple of the lanes. A is read one element at a time by its strides.
inline void multiply(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t ldb,
                     int64_t rows, int64_t columns, int64_t depth, float* c, int64_t ldc,
                     bool accumulate) {
  constexpr int64_t kWidest = Vec::kRegisters == 32 ? 4 : 3;
  int64_t left = columns / Vec::kLanes;
  for (int64_t groups = (left + kWidest - 1) / kWidest; groups > 0; --groups) {
    const int64_t n = (left + groups - 1) / groups;
    if (n == 1) multiply_columns<1>(a, a_row, a_k, b, ldb, rows, depth, c, ldc, accumulate);
    if (n == 2) multiply_columns<2>(a, a_row, a_k, b, ldb, rows, depth, c, ldc, accumulate);
    if (n == 3) multiply_columns<3>(a, a_row, a_k, b, ldb, rows, depth, c, ldc, accumulate);
    if constexpr (kWidest == 4) {
      if (n == 4) multiply_columns<4>(a, a_row, a_k, b, ldb, rows, depth, c, ldc, accumulate);
    }
    left -= n;
    b += n * Vec::kLanes;
    c += n * Vec::kLanes;
  }
}

// C[r][c] = sum_k A[r][k] B[c][k], depth a multiple of the lanes, for few columns: a lane is an
// element of the sum here, where `multiply` would leave most lanes of its columns empty. Lanes of
// C past the columns become 0.
inline void multiply_dot(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
                         int64_t columns, int64_t depth, float* c, int64_t ldc) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec::zero().store(c + r * ldc);
    for (int64_t column = 0; column < columns; ++column) {
      Vec sum = Vec::zero();
      for (int64_t k = 0; k < depth; k += Vec::kLanes)
        sum = Vec::fma(Vec::load(a + r * lda + k), Vec::load(b + column * ldb + k), sum);
      c[r * ldc + column] = sum.total();
    }
  }
}

inline void convert(const float* from, void* to, Type type, int64_t count) {
  store(to, type, 0, 1, count, from);
}

// A row of padded length, multiplied or divided in place.
inline void scale_row(float* row, int64_t columns, float factor) {
  for (int64_t i = 0; i < columns; i += Vec::kLanes)
    (Vec::load(row + i) * Vec::set(factor)).store(row + i);
}

inline void divide_row(float* row, int64_t columns, float divisor) {
  for (int64_t i = 0; i < columns; i += Vec::kLanes)
    (Vec::load(row + i) / Vec::set(divisor)).store(row + i);
}

struct Rows {
  const float* data;
  int64_t stride;
};

// The keys that a batch entry attends to: all of the first `count`, or those of a list.
struct Keys {
  int64_t count;
  const int32_t* list;

  int64_t operator[](int64_t i) const { return list ? list[i] : i; }
};

// Rows keys[first .. first + count) as float32, in place where they already are that; otherwise
// copied to `buffer` with zeros up to `columns`.
inline Rows rows(const View& view, Type type, int64_t offset, const Keys& keys, int64_t first,
                 int64_t count, int64_t dim, int64_t columns, float* buffer) {
  if (type == Type::kFloat32 && view.column == 1 && !keys.list && columns == dim) {
    return {static_cast<const float*>(view.data) + offset + first * view.row, view.row};
  }
  for (int64_t i = 0; i < count; ++i) {
    float* row = buffer + i * columns;
    load(view.data, type, offset + keys[first + i] * view.row, view.column, dim, row);
    for (int64_t d = dim; d < columns; ++d) row[d] = 0.0f;
  }
  return {buffer, columns};
}

// buffer[d][i] = row first + i of the operand, 0 for lanes past count.
inline void transpose(const View& view, Type type, int64_t offset, int64_t first, int64_t count,
                      int64_t dim, int64_t columns, float* buffer) {
  for (int64_t i = 0; i < count; ++i) {
    load(view.data, type, offset + (first + i) * view.row, view.column, dim, buffer + i, columns);
  }
  for (int64_t i = count; i < columns; ++i)
    for (int64_t d = 0; d < dim; ++d) buffer[d * columns + i] = 0.0f;
}

// The keys of batch entry b below `limit`, into `list` if some are hidden.
inline Keys visible_keys(const Attention& p, int64_t b, int64_t limit, int32_t* list) {
  if (!p.padding) return {limit, nullptr};
  int64_t count = 0;
  for (int64_t j = 0; j < limit; ++j) {
    list[count] = int32_t(j);
    count += !p.padding[b * p.padding_batch + j * p.padding_column];
  }
  return {count, count == limit ? nullptr : list};
}

// Scores of one block, keys down and queries across: raw products become scale * product + bias,
// -inf where a mask or the diagonal hides them.
inline void mask_scores(const Attention& p, int64_t b, int64_t h, int64_t query, int64_t queries,
                        const Keys& keys, int64_t first, int64_t count, int64_t columns,
                        float* scores) {
  const Vec scale = Vec::set(p.scale);
  for (int64_t j = 0; j < count * columns; j += Vec::kLanes)
    (Vec::load(scores + j) * scale).store(scores + j);
  if (p.mask.data) {
    float bias[kPanel];
    for (int64_t j = 0; j < count; ++j) {
      float* row = scores + j * columns;
      const int64_t offset =
          b * p.mask.batch + h * p.mask.head + query * p.mask.row + keys[first + j] * p.mask.column;
      if (p.mask_type == Type::kBool) {
        const bool* attend = static_cast<const bool*>(p.mask.data) + offset;
        for (int64_t i = 0; i < queries; ++i)
          if (!attend[i * p.mask.row]) row[i] = -kInfinity;
      } else {
        load(p.mask.data, p.mask_type, offset, p.mask.row, queries, bias);
        for (int64_t i = 0; i < queries; ++i) row[i] += bias[i];
      }
    }
  }
  if (p.causal && keys[first + count - 1] > query) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t hidden = keys[first + j] - query;  // queries before this key
      for (int64_t i = 0; i < (hidden < queries ? hidden : queries); ++i)
        scores[j * columns + i] = -kInfinity;
    }
  }
}

// A sum over keys in four chains: one chain of 256 positive terms errs by 4e-7, and that error is
// common to a whole row of weights.
struct FourSums {
  Vec part[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};

  Vec total() const { return (part[0] + part[1]) + (part[2] + part[3]); }
};

// The running maximum, sum and factor of the online softmax, one value per lane.
struct Statistics {
  float *maximum, *sum, *rescale;

  void clear(int64_t columns) const {
    for (int64_t i = 0; i < columns; ++i) maximum[i] = -kInfinity, sum[i] = 0.0f;
  }
};

// The maximum with 0 in place of -inf, a row without a key so far: -inf - -inf would be NaN.
inline Vec finite(const float* maximum) {
  float values[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) values[i] = maximum[i] == -kInfinity ? 0.0f : maximum[i];
  return Vec::load(values);
}

// One step of the online softmax: the block's scores become exp(S - m'), the statistics move on,
// and rescale = exp(m - m') is what earlier sums have to be multiplied by.
inline void online_softmax(int64_t count, int64_t columns, float* scores, const Statistics& s) {
  for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
    float* column = scores + lane;
    const Vec before = Vec::load(s.maximum + lane);
    Vec maximum = before;
    for (int64_t j = 0; j < count; ++j)
      maximum = Vec::max(Vec::load(column + j * columns), maximum);
    maximum.store(s.maximum + lane);
    const Vec offset = finite(s.maximum + lane);
    FourSums sum;
    for (int64_t j = 0; j < count; ++j) {
      const Vec e = exp(Vec::load(column + j * columns) - offset);
      e.store(column + j * columns);
      sum.part[j % 4] = sum.part[j % 4] + e;
    }
    const Vec rescale = exp(before - offset);
    rescale.store(s.rescale + lane);
    Vec::fma(Vec::load(s.sum + lane), rescale, sum.total()).store(s.sum + lane);
  }
}

struct Part {
  float** pointer;
  int64_t floats;
};

// Divides the thread's scratch memory into 64-byte aligned parts and a list of keys.
inline bool carve(const Attention& p, std::initializer_list<Part> parts, int32_t** list) {
  int64_t total = p.padding ? p.kv_len + 1 : 0;
  for (const Part& part : parts) total += (part.floats + 15) / 16 * 16;
  float* next = scratch(size_t(total));
  if (!next) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return false;
  }
  for (const Part& part : parts) {
    *part.pointer = next;
    next += (part.floats + 15) / 16 * 16;
  }
  *list = reinterpret_cast<int32_t*>(next);
  return true;
}

// Runs `body` over the tasks: on this thread where the work is below about 20 us.
template <class Context>
void run(ParallelFor parallel, int64_t tasks, double flops,
         void (*body)(int64_t, int64_t, const void*), const Context& context) {
  if (tasks < 2 || flops < 1e6) {
    body(0, tasks, &context);
  } else {
    parallel(tasks, body, &context);
  }
}

}  // namespace
}  // namespace ff
