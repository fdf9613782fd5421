// The inner loop of attention: query tiles walk blocks of keys.
//
// Scores are transposed: lanes are queries and the rows of K are broadcast, so
// that K needs no packing, softmax is vertical and a NaN in a query stays in its own lane. Up to
// three queries leave most lanes empty: decode.h serves them.
//
// A query tile is up to 48 queries of one head. Some tiles that share keys and values are served
// together: they walk the keys in blocks of 256 (512 in bfloat16, which rounds the weights anyway),
// prepare each block once for all, and take it through the online softmax: m the running maximum, l
// the sum, O the accumulator,
//     m' = max(m, max_j S)   O = O * exp(m - m') + exp(S - m') V   l = l * exp(m - m') + sum_j ...
#pragma once

#include "cpu/softmax/dropout.h"
#include "cpu/softmax/epilogue.h"
#include "cpu/task.h"
#include "decode.h"
#include "query_tiles.h"
#include "tail_queries.h"

namespace ff {
namespace {

template <class Math>
QueryTiles query_tiles_of(const Attention& p) {
  return QueryTiles({p.q_len, nullptr}, QueryTiles::kMost, tail_queries<Math>(p));
}

template <class Math>
class ForwardTask {
 public:
  explicit ForwardTask(const AttentionForward& p)
      : p_(p),
        value_columns_(padded(p.value_dim)),
        base_(base_of(p)),
        scaling_(scaling_of<Math>(p.scale, base_)),
        transposed_(2 * p.value_dim <= Vec::kLanes) {
    constexpr int64_t kFloats = 98304;  // 384 KB of the second cache
    const int64_t fitting = kFloats / (query_floats() + QueryTiles::kMost * value_columns_);
    most_ = fitting < 1 ? 1 : fitting < kMostTiles ? fitting : kMostTiles;
  }

  bool allocate() {
    constexpr int64_t kMost = QueryTiles::kMost;
    return carve(p_, {{&queries_, most_ * query_floats()},
                      {&outs_, most_ * kMost * value_columns_},
                      {&statistics_, most_ * 3 * kMost},
                      {&maximum_, kMost},
                      {&scores_, kKeys * kMost},
                      {&factor_, p_.dropout ? kKeys * kMost : 0},
                      {&key_, kKeys * padded(p_.head_dim)},
                      {&value_, kKeys * value_columns_},
                      {&shown_, p_.mask.data ? kKeys * kMost / Vec::kLanes : 0},
                      {&list_, p_.padding ? p_.kv_len : 0}});
  }

  // How many tiles `run` takes at most.
  int64_t most() const { return most_; }

  // Tiles first .. end of the query heads that share key head `group`.
  void run(int64_t b, int64_t group, int64_t first, int64_t end) {
    const int64_t members = p_.heads / p_.kv_heads;
    const QueryTiles tiles = query_tiles_of<Math>(p_);
    int64_t limit = 0;
    count_ = end - first;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t tile = first + i;
      const int64_t place = tile % tiles.count;
      start(b, group * members + tile / tiles.count, tiles[place], tiles.is_tail(place), i);
      const int64_t seen = keys_seen(p_, b, tile_[i].queries).end;
      limit = limit > seen ? limit : seen;
    }
    const Slice key(p_.key, p_.type, b, group), value(p_.value, p_.type, b, group);
    const Positions keys = visible_keys(p_, b, 0, limit, list_);
    int64_t begin = keys.count;
    for (int64_t i = 0; i < count_; ++i) {
      look<Math>(p_, b, keys, tile_[i]);
      begin = begin < tile_[i].begin ? begin : tile_[i].begin;
    }
    // Blocks begin at the same keys for each tile, whichever tiles walk with it.
    for (int64_t done = begin / kKeys * kKeys; done < keys.count; done += kKeys) {
      const Block block = block_at(keys, done, kKeys);
      const auto key_rows = Packing<Math>::rows(key, block, p_.head_dim, key_);
      const auto value_columns = Packing<Math>::columns(value, block, p_.value_dim, value_);
      for (int64_t i = 0; i < count_; ++i) {
        const Block some = seen(tile_[i], block);
        if (some.count <= 0) continue;
        const int64_t skipped = some.first - done;
        attend(b, i, some, rows_from(skipped, key_rows),
               steps_from(Packing<Math>::steps(skipped), value_columns));
      }
    }
    for (int64_t i = 0; i < count_; ++i) finish(b, i);
  }

 private:
  int64_t query_floats() const { return padded(p_.head_dim) * QueryTiles::kMost; }

  void start(int64_t b, int64_t h, const Block& queries, bool tail, int64_t i) {
    constexpr int64_t kMost = QueryTiles::kMost;
    float* statistics = statistics_ + i * 3 * kMost;
    QueryTile& tile = tile_[i];
    tile = {h, queries, tail ? tail_columns(queries.count) : padded(queries.count), 0,
            0, tail,    {statistics, statistics + kMost, statistics + 2 * kMost}};
    const auto operand = tail ? tail_rows<Math> : Packing<Math>::lanes;
    query_[i] = operand(Slice(p_.query, p_.type, b, h), queries, p_.head_dim, scaling_.factor,
                        queries_ + i * query_floats());
    tile.statistics.begin(padded(tile.columns), {p_, h, base_});
  }

  float* out_of(int64_t i) const { return outs_ + i * QueryTiles::kMost * value_columns_; }

  void attend(int64_t b, int64_t i, const Block& block, const LeftRows<Math>& key,
              const Right<Math>& value) {
    const QueryTile& tile = tile_[i];
    const int64_t columns = tile.columns;
    if (tile.tail) {
      const Scores scores{p_, b, tile.h, tile.queries, columns, scores_};
      attend_tail(key, query_[i], block.count, Packing<Math>::steps(p_.head_dim), columns, base_,
                  {scores, block, scaling_.unit}, maximum_, scores_, tile.statistics);
    } else {
      weigh(b, i, block, key);
    }
    const bool begins = block.first == tile.begin;
    const bool ends = block.first + block.count == tile.visible;
    const auto add = [&](int64_t from, int64_t some, bool last) {
      const auto weights = steps_from(from, PackedWeights<Math>::by_query(scores_, columns));
      const auto values = steps_from(from, value);
      const bool first = begins && from == 0;
      if (transposed_) {
        multiply(LeftColumns<Math>{values.data, values.step}, {weights.data, weights.step},
                 p_.value_dim, columns, some,
                 RescaleColumns{out_of(i), columns, tile.statistics.rescale, first});
        return;
      }
      const auto product = [&](const auto& epilogue) {
        multiply(weights, values, tile.queries.count, value_columns_, some, epilogue);
      };
      if (!direct(tile) || !ends || !last) {
        product(Rescale{out_of(i), value_columns_, tile.statistics.rescale, first});
        return;
      }
      store_product<Math>(p_.out, p_.out_type(), b, tile.h, tile.queries, p_.value_dim,
                          tile.statistics, first ? nullptr : out_of(i), maximum_, product);
    };
    sum_in_parts<Math>(Packing<Math>::steps(block.count), columns, tile.statistics, add);
  }

  // The weights of a block, in the place of the scores; the statistics move on.
  void weigh(int64_t b, int64_t i, const Block& block, const LeftRows<Math>& key) {
    const QueryTile& tile = tile_[i];
    const int64_t columns = tile.columns;
    const Scores scores{p_, b, tile.h, tile.queries, columns, scores_};
    const auto product = [&](const auto& epilogue) {
      multiply_dims(key, query_[i], block.count, columns, Packing<Math>::steps(p_.head_dim),
                    scores_, epilogue);
    };
    const float unit = make_scores(scores, block, base_, scaling_.unit, maximum_, shown_, product);
    if (p_.dropout) dropout_factors(scores, block, kRowStream, factor_);
    online_softmax<Math>(base_, block, columns, unit, maximum_, p_.dropout ? factor_ : nullptr,
                         scores_, tile.statistics);
  }

  // Whether the last product of a tile goes straight to the output.
  bool direct(const QueryTile& tile) const {
    return !tile.sees_none() && !transposed_ && takes_registers(p_.out, tile.queries, p_.value_dim);
  }

  // What is left to do after the last block.
  void finish(int64_t b, int64_t i) {
    const QueryTile& tile = tile_[i];
    if (tile.sees_none()) {
      for (int64_t e = 0; e < tile.queries.count * value_columns_; ++e) out_of(i)[e] = 0.0f;
    }
    if (!direct(tile)) {
      float* outs = out_of(i);
      if (transposed_ && !tile.sees_none()) outs = transposed_back(outs, tile.columns);
      store_means(p_.out, p_.out_type(), b, tile.h, tile.queries, p_.value_dim, tile.statistics.sum,
                  outs);
    }
    store_lse(p_.lse, p_.sums, b, tile.h, tile.queries, tile.statistics, base_);
  }

  // Sums that had lanes of queries as rows of them, in the place of the scores.
  float* transposed_back(const float* outs, int64_t columns) const {
    transpose_rows(
        {{p_.value_dim, nullptr}, 0, p_.value_dim}, columns, scores_,
        [&](int64_t d, int64_t lane, int64_t) { return Vec::load(outs + d * columns + lane); });
    return scores_;
  }

  static constexpr int64_t kMostTiles = 16;
  static constexpr int64_t kKeys = kBlock * Math::kDepth;  // at most kLargestBlock

  const AttentionForward& p_;
  int64_t value_columns_, most_, count_ = 0;
  Base base_;
  Scaling scaling_;
  bool transposed_;  // few columns of values: the lanes of the second product are queries, too
  float *queries_, *outs_, *statistics_, *maximum_, *scores_, *factor_, *key_, *value_;
  uint16_t* shown_;
  int32_t* list_;
  QueryTile tile_[kMostTiles];
  Right<Math> query_[kMostTiles];
};

// The tiles of a key head, each a part of the call.
template <class Math>
int64_t query_tiles_of_group(const Attention& p) {
  return p.heads / p.kv_heads * query_tiles_of<Math>(p).count;
}

// Tiles begin .. end, evenly divided into runs within a key head.
template <class Math>
void forward_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& p = *static_cast<const AttentionForward*>(context);
  ForwardTask<Math> task(p);
  if (!task.allocate()) return;
  const int64_t tiles = query_tiles_of_group<Math>(p);
  while (begin < end) {
    const int64_t slice = begin / tiles, first = begin % tiles;
    const int64_t left = tiles - first < end - begin ? tiles - first : end - begin;
    const int64_t runs = (left + task.most() - 1) / task.most();
    const int64_t count = (left + runs - 1) / runs;
    task.run(slice / p.kv_heads, slice % p.kv_heads, first, first + count);
    begin += count;
  }
}

template <class HalfMath>
int64_t attention_parts(const AttentionForward& p) {
  if constexpr (!kTakesAll<HalfMath>) {
    if (!narrow_products(p)) return HalfMath::kFloat32->attention_parts(p);
  }
  if (p.batch * p.heads * p.q_len == 0) return 0;
  const int64_t tiles = p.q_len <= kDecodeLength ? 1 : query_tiles_of_group<HalfMath>(p);
  return p.batch * p.kv_heads * tiles;
}

template <class HalfMath>
void attention_part(const AttentionForward& p, int64_t begin, int64_t end) {
  if constexpr (!kTakesAll<HalfMath>) {
    if (!narrow_products(p)) return HalfMath::kFloat32->attention_part(p, begin, end);
  }
  (p.q_len <= kDecodeLength ? decode_tasks : forward_tasks<HalfMath>)(begin, end, &p);
}

}  // namespace
}  // namespace ff
