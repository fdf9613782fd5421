// Packing: how rows of K, V and Q become operands of products. What can be read as it lies in
// memory stays there, and the rest is copied, converted to float32:
//
//     rows of K, left          k00 k01 k02 .. k0D             a row is a key, a step a dim
//                              k10 k11 k12 .. k1D
//
//     columns of V, right      v00 v01 v02 .. v0D 0 .. 0      a step is a key, lanes are dims
//                              v10 v11 v12 .. v1D 0 .. 0
//
//     lanes of Q, right        q00 q10 q20 .. qn0 0 .. 0      a step is a dim, lanes are queries:
//                              q01 q11 q21 .. qn1 0 .. 0      transposed
//
// with zeros up to whole registers. Scores are rows of K times lanes of Q, and outputs are weights
// (softmax/packed_weights.h) times columns of V.
#pragma once

#include "cpu/positions.h"
#include "convert.h"
#include "gemm.h"

namespace ff {
namespace {

inline void convert_rows(const Slice& from, const Block& block, int64_t dim, int64_t columns,
                         float* buffer) {
  for (int64_t i = 0; i < block.count; ++i)
    load(from.data, from.type, from.offset + block[i] * from.row, from.column, dim, columns,
         buffer + i * columns);
}

// Transposes rows: register d of row r becomes lanes r of rows d .. of the buffer, whose rows are
// as wide as the block, up to the next register; the lanes after it are 0. `load` gives the
// registers: `some` lanes of the block's i-th position, from the d-th on.
template <class Load>
inline void transpose_rows(const Block& block, int64_t dim, float* buffer, const Load& load) {
  constexpr int64_t kLanes = Vec::kLanes;
  const int64_t width = padded(block.count);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t rows = block.count - i;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t some = dim - d < kLanes ? dim - d : kLanes;
      Vec square[kLanes];
      if (rows >= kLanes) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLanes; ++r) square[r] = load(i + r, d, some);
      } else {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLanes; ++r)
          square[r] = r < rows ? load(i + r, d, some) : Vec::zero();
      }
      Vec::transpose(square);
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLanes; ++c)
        if (c < some) square[c].store(buffer + (d + c) * width + i);
    }
  }
}

// What each arithmetic makes of an operand. Buffers hold `rows` x padded(dim) floats.
template <class Math>
struct Packing;

template <>
struct Packing<Float32Math> {
  static constexpr int64_t steps(int64_t depth) { return depth; }

  // Rows as the left operand, summed over the dim.
  static LeftRows<Float32Math> rows(const Slice& from, const Block& block, int64_t dim,
                                    float* buffer) {
    if (from.type == Type::kFloat32 && from.column == 1 && block.adjacent()) {
      return {from.at<float>(block[0]), from.row};
    }
    convert_rows(from, block, dim, dim, buffer);
    return {buffer, dim};
  }

  // Rows as the right operand, summed over the rows; zeros from `dim` up to the next register.
  static Right<Float32Math> columns(const Slice& from, const Block& block, int64_t dim,
                                    float* buffer) {
    const int64_t width = padded(dim);
    if (from.type == Type::kFloat32 && from.column == 1 && block.adjacent() && width == dim) {
      return {from.at<float>(block[0]), from.row};
    }
    convert_rows(from, block, dim, width, buffer);
    return {buffer, width};
  }

  // A row times `factor`, zeros up to `width`.
  static void row(const Slice& from, int64_t i, int64_t dim, int64_t width, float factor,
                  float* to) {
    load(from.data, from.type, from.offset + i * from.row, from.column, dim, width, to);
    for (int64_t d = 0; d < dim; ++d) to[d] *= factor;
  }

  // Rows times `factor` as the right operand that is summed over the dim: lanes are rows, zeros up
  // to the next register.
  static Right<Float32Math> lanes(const Slice& from, const Block& block, int64_t dim, float factor,
                                  float* buffer) {
    with_type(from.type, [&](auto kind) {
      using T = decltype(kind);
      using Element = typename T::Element;
      const Vec scale = Vec::set(factor);
      if (from.column == 1 && block.adjacent()) {
        const auto* first = from.at<Element>(block[0]);
        transpose_rows(block, dim, buffer, [&](int64_t i, int64_t d, int64_t some) {
          const auto* row = first + i * from.row + d;
          __builtin_prefetch(row + Vec::kLanes * from.row);  // the columns come too late to guess
          return T::load(row, some) * scale;
        });
      } else {
        transpose_rows(block, dim, buffer, [&](int64_t i, int64_t d, int64_t some) {
          const auto* row = from.at<Element>(block[i]);
          return load_lanes<T>(row + d * from.column, from.column, some) * scale;
        });
      }
    });
    return {buffer, padded(block.count)};
  }
};

}  // namespace
}  // namespace ff
