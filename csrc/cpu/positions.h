// Rows of an operand: positions of a sequence, blocks of them, and one head in memory.
#pragma once

#include "api.h"

namespace ff {
namespace {

// Positions of a sequence: `count` from the `start` on, or those of a list, in ascending order.
struct Positions {
  int64_t count;
  const int32_t* list;
  int64_t start = 0;

  int64_t operator[](int64_t i) const { return list ? list[i] : start + i; }

  // How many of them come before `limit`.
  int64_t before(int64_t limit) const {
    int64_t low = 0, high = count;
    if (!list) return limit - start < count ? limit - start : count;
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

// The keys of batch entry b from `first` to before `end`, into `list` if some are hidden.
inline Positions visible_keys(const Attention& p, int64_t b, int64_t first, int64_t end,
                              int32_t* list) {
  const int64_t all = end > first ? end - first : 0;
  if (!p.padding) return {all, nullptr, first};
  int64_t count = 0;
  for (int64_t j = first; j < end; ++j) {
    list[count] = int32_t(j);
    count += !p.padding[b * p.padding_batch + j * p.padding_column];
  }
  return {count, count == all ? nullptr : list, first};
}

// The positions that no padding hides, and the others.
struct VisibleAndHidden {
  Positions visible, hidden;
};

// Both into `list`, which has room for all of `count`; the mask begins at `offset`.
inline VisibleAndHidden by_visibility(const Bool* padding, int64_t offset, int64_t stride,
                                      int64_t count, int32_t* list) {
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

}  // namespace
}  // namespace ff
