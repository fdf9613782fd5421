// Panels: the queries that are served side by side, one to a lane.
#pragma once

#include "cpu/softmax/softmax.h"

namespace ff {
namespace {

constexpr int64_t kGroup = 4;  // panels that share what is made of a block of keys

// Queries of a head, evenly divided: a register more or less would be idle in the last panel.
struct Panels {
  static constexpr int64_t kMost = 48;  // queries; a caller may want another multiple of the lanes

  Positions queries;
  int64_t rest;  // of them, a panel of their own behind the others
  int64_t vectors, count;

  explicit Panels(const Positions& queries, int64_t most = kMost, int64_t rest = 0)
      : queries(queries),
        rest(rest),
        vectors(padded(queries.count - rest) / Vec::kLanes),
        count((padded(queries.count - rest) + most - 1) / most + (rest > 0)) {}

  bool rest_at(int64_t panel) const { return rest > 0 && panel == count - 1; }

  Block operator[](int64_t panel) const {
    if (rest_at(panel)) return {queries, queries.count - rest, rest};
    const int64_t begin = first(panel), next = first(panel + 1);
    return {queries, begin, (next < queries.count ? next : queries.count) - begin};
  }

 private:
  int64_t first(int64_t panel) const {
    return panel * vectors / (count - (rest > 0)) * Vec::kLanes;
  }
};

// All queries of a head.
inline Panels all_panels(const Attention& p) { return Panels({p.q_len, nullptr}); }

struct Panel {
  int64_t h;
  Block queries;
  int64_t columns;
  int64_t visible;  // keys, the first of those that no padding hides
  bool rest;
  Statistics statistics;
};

// What a panel sees of a block; its count may be 0 or less.
inline Block seen(const Panel& panel, const Block& block) {
  const int64_t left = panel.visible - block.first;
  return {block.positions, block.first, left < block.count ? left : block.count};
}

}  // namespace
}  // namespace ff
