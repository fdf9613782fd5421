// Packing of bfloat16: a lane takes two numbers of the summed dimension at once, here in brackets,
// the first in the lower half; zeros fill the last pair and the last register.
//
//     rows of K, left          [k00 k01] [k02 k03] ..             as it lies in memory
//                              [k10 k11] [k12 k13] ..
//
//     columns of V, right      [v00 v10] [v01 v11] .. [0 0]       a step is two keys
//                              [v20 v30] [v21 v31] .. [0 0]
//
//     lanes of Q, right        [q00 q01] [q10 q11] .. [0 0]       a step is two dims: transposed
//                              [q02 q03] [q12 q13] .. [0 0]
#pragma once

#include "packing.h"

namespace ff {
namespace {

template <>
struct Packing<BFloat16Math> {
  static constexpr int64_t steps(int64_t depth) { return (depth + 1) / 2; }

  static LeftRows<BFloat16Math> rows(const Slice& from, const Block& block, int64_t dim,
                                     float* buffer) {
    if (from.column == 1 && block.adjacent() && dim % 2 == 0) {
      return {from.at<uint16_t>(block[0]), from.row};
    }
    auto* copy = reinterpret_cast<uint16_t*>(buffer);
    const int64_t stride = 2 * steps(dim);
    for (int64_t i = 0; i < block.count; ++i)
      copy_row(from, block[i], 0, dim, stride, copy + i * stride);
    return {copy, stride};
  }

  static Right<BFloat16Math> columns(const Slice& from, const Block& block, int64_t dim,
                                     float* buffer) {
    const int64_t width = padded(dim);
    auto* pairs = reinterpret_cast<uint16_t*>(buffer);
    if (from.column != 1) {
      uint16_t copies[2][kWide];
      for (int64_t d = 0; d < dim; d += kWide) {
        const int64_t some = dim - d < kWide ? dim - d : kWide;
        const auto copied = [&](int64_t i, int64_t) {
          copy_row(from, block[i], d, some, kWide, copies[i % 2]);
          return copies[i % 2];
        };
        pair_columns(copied, block.count, d, dim, width, pairs);
      }
    } else if (block.adjacent()) {
      const auto* first = from.at<uint16_t>(block[0]);
      const auto adjacent = [&](int64_t i, int64_t d) { return first + i * from.row + d; };
      pair_rows(adjacent, block.count, dim, width, pairs);
    } else {
      const auto listed = [&](int64_t i, int64_t d) { return from.at<uint16_t>(block[i]) + d; };
      pair_rows(listed, block.count, dim, width, pairs);
    }
    return {pairs, 2 * width};
  }

  // A row times the sign of `factor`, zeros up to `width`.
  static void row(const Slice& from, int64_t i, int64_t dim, int64_t width, float factor,
                  uint16_t* to) {
    copy_row(from, i, 0, dim, width, to);
    for (int64_t d = 0; d < dim && factor < 0.0f; ++d) to[d] ^= 0x8000u;
  }

  // The sign of `factor` is all that is multiplied in: the rest would round.
  static Right<BFloat16Math> lanes(const Slice& from, const Block& block, int64_t dim, float factor,
                                   float* buffer) {
    if (from.column == 1 && block.adjacent() && dim % 2 == 0 && !(factor < 0.0f)) {
      const auto* first = from.at<uint16_t>(block[0]);
      transpose_rows(block, dim / 2, buffer, [&](int64_t i, int64_t d, int64_t some) {
        const uint16_t* row = first + i * from.row + 2 * d;
        __builtin_prefetch(row + Vec::kLanes * from.row);
        return BFloat16Math::load_pairs(row, some);
      });
    } else {
      transpose_rows(block, steps(dim), buffer, [&](int64_t i, int64_t d, int64_t some) {
        uint16_t copy[kWide];
        const int64_t left = dim - 2 * d < kWide ? dim - 2 * d : kWide;
        copy_row(from, block[i], 2 * d, left, kWide, copy);
        for (int64_t k = 0; k < left && factor < 0.0f; ++k) copy[k] ^= 0x8000u;
        return BFloat16Math::load_pairs(copy, some);
      });
    }
    return {reinterpret_cast<const uint16_t*>(buffer), 2 * padded(block.count)};
  }

 private:
  static constexpr int64_t kWide = 2 * Vec::kLanes;  // numbers in a register

  // Rows in pairs, row(i, d) where the columns of row i from `d` on stand; zeros from `dim` up to
  // `width`.
  template <class Row>
  static void pair_rows(const Row& row, int64_t count, int64_t dim, int64_t width,
                        uint16_t* pairs) {
    for (int64_t d = 0; d < dim; d += kWide) pair_columns(row, count, d, dim, width, pairs);
  }

  // Of these the columns from `d` on that are one register of the rows and two of the pairs.
  template <class Row>
  static void pair_columns(const Row& row, int64_t count, int64_t d, int64_t dim, int64_t width,
                           uint16_t* pairs) {
    const auto pair = [&](int64_t some, int64_t lanes) __attribute__((always_inline)) {
      uint16_t* to = pairs + 2 * d;
      int64_t i = 0;
      for (; i + 2 <= count; i += 2, to += 2 * width)
        BFloat16Math::store_pairs(to, row(i, d), row(i + 1, d), some, lanes);
      if (i < count) BFloat16Math::store_pairs(to, row(i, d), nullptr, some, lanes);
    };
    if (dim - d >= kWide) {
      pair(kWide, kWide);
    } else {
      pair(dim - d, width - d);
    }
  }

  // to[c] = row i, columns first .. first + count, and zeros up to `columns`.
  static void copy_row(const Slice& from, int64_t i, int64_t first, int64_t count, int64_t columns,
                       uint16_t* to) {
    const uint16_t* row = from.at<uint16_t>(i) + first * from.column;
    if (from.column == 1) {
      __builtin_memcpy(to, row, size_t(count) * sizeof *to);
    } else {
      for (int64_t c = 0; c < count; ++c) to[c] = row[c * from.column];
    }
    for (int64_t c = count; c < columns; ++c) to[c] = 0;
  }
};

}  // namespace
}  // namespace ff
