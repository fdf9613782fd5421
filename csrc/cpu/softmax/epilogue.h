// The epilogue of a softmax: from sums of weighted values to outputs and log-sum-exps.
#pragma once

#include "online_softmax.h"

namespace ff {
namespace {

// Rows of `to` = factor(row) * from, whose rows are padded to whole registers.
template <class Factor>
inline void store_rows(const MutableView& to, Type type, int64_t b, int64_t h, const Block& rows,
                       int64_t dim, const Factor& factor, const float* from) {
  constexpr int64_t kLanes = Vec::kLanes;
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    auto* head = static_cast<typename T::Element*>(to.data) + b * to.batch + h * to.head;
    for (int64_t i = 0; i < rows.count; ++i) {
      const Vec scale = Vec::set(factor(i));
      auto* row = head + rows[i] * to.row;
      for (int64_t d = 0; d < dim; d += kLanes, from += kLanes)
        store_lanes<T>(row + d * to.column, to.column, dim - d < kLanes ? dim - d : kLanes,
                       Vec::load(from) * scale);
    }
  });
}

// Sums of weighted values divided by those of weights.
inline void store_means(const MutableView& out, Type type, int64_t b, int64_t h, const Block& rows,
                        int64_t dim, const float* sum, const float* from) {
  store_rows(out, type, b, h, rows, dim, [&](int64_t i) { return inverse(sum[i]); }, from);
}

// Sums of weighted values over the steps of a block, in float32 as chains of at most 192: one of
// 256 errs twice as much as the plain formula, whose product halves what is longer, two of 128 as
// much. Calls add(from, some, last) for `some` steps each; the sums, of `rows` rows, are rescaled
// once. Over 197 keys a call takes 1.5 % longer.
template <class Math, class Add>
inline void sum_in_parts(int64_t steps, int64_t rows, const Statistics& s, const Add& add) {
  constexpr int64_t kLongest = 192;
  const int64_t parts = Math::kDepth > 1 ? 1 : (steps + kLongest - 1) / kLongest;
  for (int64_t left = parts, from = 0; left > 0; --left) {
    const int64_t some = (steps - from + left - 1) / left;
    add(from, some, left == 1);
    for (int64_t i = 0; i < rows && left > 1; ++i) s.rescale[i] = 1.0f;
    from += some;
  }
}

// Rows of the output = before * rescale[row] + product * factor[row], or the latter alone where
// nothing was summed before.
template <class T>
struct StoreMeans {
  typename T::Element* to;
  int64_t stride;
  const float* factor;
  const float* before;
  int64_t before_stride;
  const float* rescale;

  template <int R, int N>
  void operator()(int64_t row, int64_t column, const Vec (&sum)[R][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec scale = Vec::set(factor[row + r]);
      auto* at = to + (row + r) * stride + column;
      if (!before) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) T::store(at + n * Vec::kLanes, sum[r][n] * scale, Vec::kLanes);
        continue;
      }
      const Vec old = Vec::set(rescale[row + r]);
      const float* from = before + (row + r) * before_stride + column;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const Vec mean = Vec::fma(Vec::load(from + n * Vec::kLanes), old, sum[r][n] * scale);
        T::store(at + n * Vec::kLanes, mean, Vec::kLanes);
      }
    }
  }
};

// Whether rows of an output take whole registers.
inline bool takes_registers(const MutableView& out, const Block& rows, int64_t dim) {
  return out.column == 1 && padded(dim) == dim && rows.adjacent();
}

// The last product of a softmax, straight to the output: calls `product` with the above for rows
// of `out`, which have to take whole registers, and what was summed `before` or null. Of the
// statistics the rescale factors are void then; `factor` has room for one number a row.
template <class Math, class Product>
inline void store_product(const MutableView& out, Type type, int64_t b, int64_t h,
                          const Block& rows, int64_t dim, const Statistics& s, const float* before,
                          float* factor, const Product& product) {
  for (int64_t i = 0; i < rows.count; ++i) {
    factor[i] = inverse(s.sum[i]);
    s.rescale[i] *= factor[i];
  }
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    auto* to = static_cast<typename T::Element*>(out.data) + b * out.batch + h * out.head +
               rows[0] * out.row;
    product(StoreMeans<T>{to, out.row, factor, before, dim, s.rescale});
  };
  if (Math::kDepth == 1) {
    with_type(type, run);
  } else if (type == Type::kFloat32) {
    run(Float32{});
  } else {
    run(BFloat16{});
  }
}

// Log-sum-exps, or maxima as they are and sums where these have a place.
inline void store_lse(const MutableLse& lse, float* sums, int64_t b, int64_t h, const Block& rows,
                      const Statistics& s, Base base) {
  if (!lse.data) return;
  const int64_t head = b * lse.batch + h * lse.head;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t at = head + rows[i] * lse.row;
    lse.data[at] = sums ? s.maximum[i] : log_sum(s.maximum[i], s.sum[i], base);
    if (sums) sums[at] = s.sum[i];
  }
}

}  // namespace
}  // namespace ff
