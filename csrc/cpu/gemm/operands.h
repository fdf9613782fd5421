// The operands of the products: rows of K and V, in place where they can be read as they are, and
// queries turned round so that lanes are queries.
#pragma once

#include "convert.h"
#include "matrix.h"

namespace ff {
namespace {

// Positions of a sequence: all of the first `count`, or those of a list, in ascending order.
struct Positions {
  int64_t count;
  const int32_t* list;

  int64_t operator[](int64_t i) const { return list ? list[i] : i; }

  // How many of them come before `limit`.
  int64_t before(int64_t limit) const {
    int64_t low = 0, high = count;
    if (!list) return limit < count ? limit : count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (list[middle] < limit) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The keys of batch entry b below `limit`, into `list` if some are hidden.
inline Positions visible_keys(const Attention& p, int64_t b, int64_t limit, int32_t* list) {
  if (!p.padding) return {limit, nullptr};
  int64_t count = 0;
  for (int64_t j = 0; j < limit; ++j) {
    list[count] = int32_t(j);
    count += !p.padding[b * p.padding_batch + j * p.padding_column];
  }
  return {count, count == limit ? nullptr : list};
}

// The positions that no padding hides, and the others.
struct Split {
  Positions visible, hidden;
};

// Both into `list`, which has room for all of `count`; the mask begins at `offset`.
inline Split split(const Bool* padding, int64_t offset, int64_t stride, int64_t count,
                   int32_t* list) {
  if (!padding) return {{count, nullptr}, {0, nullptr}};
  padding += offset;
  int64_t visible = 0, hidden = 0;
  for (int64_t i = 0; i < count; ++i)
    if (!padding[i * stride]) list[visible++] = int32_t(i);
  for (int64_t i = 0; i < count; ++i)
    if (padding[i * stride]) list[visible + hidden++] = int32_t(i);
  return {{visible, list}, {hidden, list + visible}};
}

constexpr int64_t kBlock = 256;  // keys in one accumulation chain: longer ones lose accuracy
constexpr int64_t kLargestBlock = 2 * kBlock;

// Some of the positions: `count` from the `first` on.
struct Block {
  Positions positions;
  int64_t first, count;

  int64_t operator[](int64_t i) const { return positions[first + i]; }

  // Whether they follow each other in memory.
  bool adjacent() const {
    return !positions.list || count == 0 || (*this)[count - 1] - (*this)[0] == count - 1;
  }
};

// A position alone.
inline Block one(int64_t i) { return {{i + 1, nullptr}, i, 1}; }

// The block that starts with the `first`.
inline Block block_at(const Positions& positions, int64_t first, int64_t most = kBlock) {
  const int64_t left = positions.count - first;
  return {positions, first, left < most ? left : most};
}

// A (rows, columns) matrix: one head of an operand.
struct Slice {
  const void* data;
  Type type;
  int64_t offset, row, column;  // elements

  Slice(const View& view, Type type, int64_t b, int64_t h)
      : data(view.data),
        type(type),
        offset(b * view.batch + h * view.head),
        row(view.row),
        column(view.column) {}

  template <class T>
  const T* at(int64_t i) const {
    return static_cast<const T*>(data) + offset + i * row;
  }
};

inline void convert_rows(const Slice& from, const Block& block, int64_t dim, int64_t columns,
                         float* buffer) {
  for (int64_t i = 0; i < block.count; ++i)
    load(from.data, from.type, from.offset + block[i] * from.row, from.column, dim, columns,
         buffer + i * columns);
}

// Turns rows round: register d of row r becomes lanes r of rows d .. of the buffer, whose rows are
// as wide as the block, up to the next register; the lanes after it are 0. `load` gives the
// registers: `some` lanes of the block's i-th position, from the d-th on.
template <class Load>
inline void turn_rows(const Block& block, int64_t dim, float* buffer, const Load& load) {
  constexpr int64_t kLanes = Vec::kLanes;
  const int64_t width = padded(block.count);
  for (int64_t i = 0; i < width; i += kLanes) {
    const int64_t rows = block.count - i;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t some = dim - d < kLanes ? dim - d : kLanes;
      Vec tile[kLanes];
      if (rows >= kLanes) {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLanes; ++r) tile[r] = load(i + r, d, some);
      } else {
#pragma GCC unroll 16
        for (int64_t r = 0; r < kLanes; ++r)
          tile[r] = r < rows ? load(i + r, d, some) : Vec::zero();
      }
      Vec::transpose(tile);
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLanes; ++c)
        if (c < some) tile[c].store(buffer + (d + c) * width + i);
    }
  }
}

// What each arithmetic makes of an operand. Buffers hold `rows` x padded(dim) floats.
template <class Math>
struct Operands;

template <>
struct Operands<Float32Math> {
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
        turn_rows(block, dim, buffer, [&](int64_t i, int64_t d, int64_t some) {
          const auto* row = first + i * from.row + d;
          __builtin_prefetch(row + Vec::kLanes * from.row);  // the columns come too late to guess
          return T::load(row, some) * scale;
        });
      } else {
        turn_rows(block, dim, buffer, [&](int64_t i, int64_t d, int64_t some) {
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
