// Panels: the queries that are served side by side, one to a lane.
#pragma once

#include "softmax.h"

namespace ff {
namespace {

constexpr int64_t kGroup = 4;  // panels that share what is made of a block of keys

// Queries of a head, evenly divided: a register more or less would be idle in the last panel.
struct Panels {
  static constexpr int64_t kMost = 48;  // queries

  int64_t queries, vectors, count;

  explicit Panels(int64_t queries)
      : queries(queries),
        vectors(padded(queries) / Vec::kLanes),
        count((padded(queries) + kMost - 1) / kMost) {}

  int64_t first(int64_t panel) const { return panel * vectors / count * Vec::kLanes; }
  int64_t end(int64_t panel) const {
    const int64_t next = first(panel + 1);
    return next < queries ? next : queries;
  }
};

struct Panel {
  int64_t h, first, queries, columns;
  int64_t visible;  // keys, the first of those that no padding hides
  Statistics statistics;
};

// What a panel sees of a block; its count may be 0 or less.
inline Block seen(const Panel& panel, const Block& block) {
  const int64_t left = panel.visible - block.first;
  return {block.keys, block.first, left < block.count ? left : block.count};
}

}  // namespace
}  // namespace ff
