// Panels: the queries that are served side by side, one to a lane.
#pragma once

#include "softmax.h"

namespace ff {
namespace {

constexpr int64_t kGroup = 4;  // panels that share what is made of a block of keys

// Queries of a head, evenly divided: a register more or less would be idle in the last panel.
struct Panels {
  static constexpr int64_t kMost = 48;  // queries; a caller may want another multiple of the lanes

  Positions queries;
  int64_t vectors, count;

  explicit Panels(const Positions& queries, int64_t most = kMost)
      : queries(queries),
        vectors(padded(queries.count) / Vec::kLanes),
        count((padded(queries.count) + most - 1) / most) {}

  Block operator[](int64_t panel) const {
    const int64_t begin = first(panel), next = first(panel + 1);
    return {queries, begin, (next < queries.count ? next : queries.count) - begin};
  }

 private:
  int64_t first(int64_t panel) const { return panel * vectors / count * Vec::kLanes; }
};

// All queries of a head.
inline Panels all_panels(const Attention& p) { return Panels({p.q_len, nullptr}); }

struct Panel {
  int64_t h;
  Block queries;
  int64_t columns;
  int64_t visible;  // keys, the first of those that no padding hides
  Statistics statistics;
};

// What a panel sees of a block; its count may be 0 or less.
inline Block seen(const Panel& panel, const Block& block) {
  const int64_t left = panel.visible - block.first;
  return {block.positions, block.first, left < block.count ? left : block.count};
}

}  // namespace
}  // namespace ff
