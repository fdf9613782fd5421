// Query tiles: queries that are served side by side, one to a lane, by the same blocks of keys.
//
// Of the three words with "tile" the others are the score tile of bidirectional attention, which is
// a query tile's part of a block, and the register tile that gemm.h adds up in.
#pragma once

#include "cpu/gemm/packing.h"
#include "cpu/softmax/online_softmax.h"

namespace ff {
namespace {

constexpr int64_t kTileGroup = 4;  // tiles that share what is made of a block of keys

// Queries of a head, evenly divided: a register more or less would be idle in the last tile.
struct QueryTiles {
  static constexpr int64_t kMost = 48;  // queries; a caller may want another multiple of the lanes

  Positions queries;
  int64_t tail;  // of them, a tile of their own behind the others
  int64_t vectors, count;

  explicit QueryTiles(const Positions& queries, int64_t most = kMost, int64_t tail = 0)
      : queries(queries),
        tail(tail),
        vectors(padded(queries.count - tail) / Vec::kLanes),
        count((padded(queries.count - tail) + most - 1) / most + (tail > 0)) {}

  bool is_tail(int64_t tile) const { return tail > 0 && tile == count - 1; }

  Block operator[](int64_t tile) const {
    if (is_tail(tile)) return {queries, queries.count - tail, tail};
    const int64_t begin = first(tile), next = first(tile + 1);
    return {queries, begin, (next < queries.count ? next : queries.count) - begin};
  }

 private:
  int64_t first(int64_t tile) const { return tile * vectors / (count - (tail > 0)) * Vec::kLanes; }
};

// All queries of a head.
inline QueryTiles all_query_tiles(const Attention& p) { return QueryTiles({p.q_len, nullptr}); }

struct QueryTile {
  int64_t h;
  Block queries;
  int64_t columns;
  int64_t begin, visible;  // the keys it sees, of those that no padding hides: begin .. visible
  bool tail;
  Statistics statistics;

  bool sees_none() const { return visible <= begin; }
};

// Tells a tile which of the keys it sees, from a whole step of the products on.
template <class Math>
inline void look(const Attention& p, int64_t b, const Positions& keys, QueryTile& tile) {
  const KeyRange range = keys_seen(p, b, tile.queries);
  tile.begin = keys.before(range.first) / Math::kDepth * Math::kDepth;
  tile.visible = keys.before(range.end);
}

// What a tile sees of a block; its count may be 0 or less.
inline Block seen(const QueryTile& tile, const Block& block) {
  const int64_t first = tile.begin > block.first ? tile.begin : block.first;
  const int64_t end = block.first + block.count;
  return {block.positions, first, (tile.visible < end ? tile.visible : end) - first};
}

}  // namespace
}  // namespace ff
