// What the weights of attention amount to, without the weights: the entropy of each query's, and
// the mass that each key receives from all queries. Scores are made for each of them, in float32:
//
//     queries    the online softmax with one more sum,
//                    m' = max(m, max_j S)   l' = l exp(m - m') + sum_j exp(S - m')
//                    w' = (w + (m - m') l) exp(m - m') + sum_j (S - m') exp(S - m')
//                entropy = log l - w / l        lse = m + log l
//     keys       mass = sum_i exp(S - lse)
#pragma once

#include "cpu/softmax/epilogue.h"
#include "cpu/task.h"
#include "query_tiles.h"

namespace ff {
namespace {

// The scores of a block of keys against a query tile, as natural exponents; returns their unit.
inline float multiply_scores(const Scores& s, const Block& block, const LeftRows<Float32Math>& key,
                             const Right<Float32Math>& query, float unit, float* maximum,
                             uint16_t* shown) {
  const auto product = [&](const auto& epilogue) {
    multiply_dims(key, query, block.count, s.columns, s.p.head_dim, s.data, epilogue);
  };
  return make_scores(s, block, Base::kE, unit, maximum, shown, product);
}

constexpr float kLeastExponent = -200.0f;  // whose exponential is 0, and 0 times it is none

// Takes the scores of a block into the statistics of a query tile and its sums of (S - m) exp.
inline void add_to_queries(const Scores& scores, const Block& block, float unit,
                           const float* maximum, const Statistics& s, float* weighted) {
  const Vec scale = Vec::set(unit), least = Vec::set(kLeastExponent), log2e = Vec::set(1.44269504f);
  for (int64_t lane = 0; lane < scores.columns; lane += Vec::kLanes) {
    const Vec before = Vec::load(s.maximum + lane);
    const Vec now = Vec::max(Vec::load(maximum + lane) * scale, before);
    const Vec offset = finite(now), down = Vec::zero() - offset;
    Vec sums[2];
    add_short_chains(
        block.count,
        [&](int64_t j, Vec(&part)[2]) __attribute__((always_inline)) {
          const Vec score = Vec::load(scores.data + j * scores.columns + lane);
          const Vec below = Vec::max(least, Vec::fma(score, scale, down));
          const Vec weight = power_of_product(below, log2e);
          part[0] = part[0] + weight;
          part[1] = Vec::fma(weight, below, part[1]);
        },
        sums);
    const Vec fall = Vec::max(least, before - offset);
    const Vec rescale = power_of_product(fall, log2e), sum = Vec::load(s.sum + lane);
    const Vec moved = Vec::fma(fall, sum, Vec::load(weighted + lane));
    now.store(s.maximum + lane);
    Vec::fma(sum, rescale, sums[0]).store(s.sum + lane);
    Vec::fma(moved, rescale, sums[1]).store(weighted + lane);
  }
}

// Some query tiles of a head: they share what is made of a block of keys.
class QueryStatisticsTask {
 public:
  static constexpr int64_t kMostTiles = 8;

  explicit QueryStatisticsTask(const WeightStatistics& p)
      : p_(p), scaling_(scaling_of<Float32Math>(p.scale, Base::kE)) {}

  bool allocate() {
    constexpr int64_t kMost = QueryTiles::kMost;
    return carve(p_, {{&queries_, kMostTiles * query_floats()},
                      {&sums_, kMostTiles * 3 * kMost},
                      {&maximum_, kMost},
                      {&scores_, kBlock * kMost},
                      {&key_, kBlock * padded(p_.head_dim)},
                      {&shown_, p_.mask.data ? kBlock * kMost / Vec::kLanes : 0},
                      {&list_, p_.padding ? p_.kv_len : 0}});
  }

  static int64_t groups(const WeightStatistics& p) {
    return (all_query_tiles(p).count + kMostTiles - 1) / kMostTiles;
  }

  void run(int64_t b, int64_t h, int64_t group) {
    const QueryTiles tiles = all_query_tiles(p_);
    const int64_t first = group * kMostTiles, left = tiles.count - first;
    const int64_t count = left < kMostTiles ? left : kMostTiles;
    const Positions keys = visible_keys(p_, b, 0, p_.kv_len, list_);
    int64_t begin = keys.count, end = 0;
    for (int64_t i = 0; i < count; ++i) {
      start(b, h, tiles[first + i], keys, i);
      begin = begin < tile_[i].begin ? begin : tile_[i].begin;
      end = end > tile_[i].visible ? end : tile_[i].visible;
    }
    const Slice key(p_.key, p_.type, b, h / (p_.heads / p_.kv_heads));
    for (int64_t done = begin / kBlock * kBlock; done < end; done += kBlock) {
      const Block block = block_at(keys, done);
      const auto rows = Packing<Float32Math>::rows(key, block, p_.head_dim, key_);
      for (int64_t i = 0; i < count; ++i) {
        const Block some = seen(tile_[i], block);
        if (some.count > 0) add(b, i, some, rows_from(some.first - done, rows));
      }
    }
    for (int64_t i = 0; i < count; ++i) finish(b, i);
  }

 private:
  int64_t query_floats() const { return padded(p_.head_dim) * QueryTiles::kMost; }

  void start(int64_t b, int64_t h, const Block& queries, const Positions& keys, int64_t i) {
    constexpr int64_t kMost = QueryTiles::kMost;
    float* sums = sums_ + i * 3 * kMost;
    QueryTile& tile = tile_[i];
    tile = {h, queries, padded(queries.count), 0, 0, false, {sums, sums + kMost, nullptr}};
    weighted_[i] = sums + 2 * kMost;
    look<Float32Math>(p_, b, keys, tile);
    query_[i] = Packing<Float32Math>::lanes(Slice(p_.query, p_.type, b, h), queries, p_.head_dim,
                                            scaling_.factor, queries_ + i * query_floats());
    tile.statistics.clear(tile.columns);
    for (int64_t e = 0; e < tile.columns; ++e) weighted_[i][e] = 0.0f;
  }

  void add(int64_t b, int64_t i, const Block& block, const LeftRows<Float32Math>& key) {
    const QueryTile& tile = tile_[i];
    const Scores scores{p_, b, tile.h, tile.queries, tile.columns, scores_};
    const float unit =
        multiply_scores(scores, block, key, query_[i], scaling_.unit, maximum_, shown_);
    add_to_queries(scores, block, unit, maximum_, tile.statistics, weighted_[i]);
  }

  void finish(int64_t b, int64_t i) {
    const QueryTile& tile = tile_[i];
    const Statistics& s = tile.statistics;
    store_lse(p_.lse, nullptr, b, tile.h, tile.queries, s, Base::kE);
    if (!p_.entropy.data) return;
    const int64_t head = b * p_.entropy.batch + tile.h * p_.entropy.head;
    for (int64_t e = 0; e < tile.queries.count; ++e) {
      const int64_t query = tile.queries[e];
      float entropy = s.sum[e] == 0.0f ? 0.0f : std::log(s.sum[e]) - weighted_[i][e] / s.sum[e];
      if (p_.ignores(b, query) || entropy < 0.0f) entropy = 0.0f;
      p_.entropy.data[head + query * p_.entropy.row] = entropy;
    }
  }

  const WeightStatistics& p_;
  Scaling scaling_;
  float *queries_, *sums_, *maximum_, *scores_, *key_;
  uint16_t* shown_;
  int32_t* list_;
  QueryTile tile_[kMostTiles];
  float* weighted_[kMostTiles];
  Right<Float32Math> query_[kMostTiles];
};

// The mass of some blocks of a head's keys: they share what is made of a query tile. Sums over the
// tiles are of double precision, or thousands of queries would err by their number.
class KeyStatisticsTask {
 public:
  static constexpr int64_t kBlocks = 4, kKeys = kBlocks * kBlock;

  explicit KeyStatisticsTask(const WeightStatistics& p)
      : p_(p), scaling_(scaling_of<Float32Math>(p.scale, Base::kE)) {}

  bool allocate() {
    constexpr int64_t kMost = QueryTiles::kMost;
    return carve(p_, {{&queries_, padded(p_.head_dim) * kMost},
                      {&offset_, kMost},
                      {&maximum_, kMost},
                      {&scores_, kBlock * kMost},
                      {&keys_, kKeys * padded(p_.head_dim)},
                      {&mass_, kKeys},
                      {&shown_, p_.mask.data ? kBlock * kMost / Vec::kLanes : 0},
                      {&list_, p_.padding ? p_.kv_len : 0}});
  }

  static int64_t groups(const WeightStatistics& p) { return (p.kv_len + kKeys - 1) / kKeys; }

  void run(int64_t b, int64_t h, int64_t group) {
    const Positions keys = visible_keys(p_, b, 0, p_.kv_len, list_);
    const Block all = block_at(keys, group * kKeys, kKeys);
    if (all.count <= 0) return;
    const Slice key(p_.key, p_.type, b, h / (p_.heads / p_.kv_heads));
    LeftRows<Float32Math> rows[kBlocks];
    for (int64_t n = 0; n * kBlock < all.count; ++n)
      rows[n] = Packing<Float32Math>::rows(key, block(all, n), p_.head_dim,
                                           keys_ + n * kBlock * padded(p_.head_dim));
    for (int64_t j = 0; j < all.count; ++j) mass_[j] = 0.0;
    const QueryTiles tiles = all_query_tiles(p_);
    for (int64_t i = 0; i < tiles.count; ++i) {
      QueryTile tile{h, tiles[i], padded(tiles[i].count), 0, 0, false, {}};
      look<Float32Math>(p_, b, keys, tile);
      if (seen(tile, all).count <= 0 || !start(b, tile)) continue;
      for (int64_t n = 0; n * kBlock < all.count; ++n) {
        const Block whole = block(all, n), some = seen(tile, whole);
        const int64_t skipped = some.first - whole.first;
        if (some.count > 0)
          add(b, tile, some, rows_from(skipped, rows[n]), mass_ + n * kBlock + skipped);
      }
    }
    float* to = p_.mass.data + b * p_.mass.batch + h * p_.mass.head;
    for (int64_t j = 0; j < all.count; ++j) to[all[j] * p_.mass.row] = float(mass_[j]);
  }

 private:
  static Block block(const Block& all, int64_t n) {
    const int64_t left = all.count - n * kBlock;
    return {all.positions, all.first + n * kBlock, left < kBlock ? left : kBlock};
  }

  // Prepares a tile; false where none of its queries counts.
  bool start(int64_t b, const QueryTile& tile) {
    const int64_t head = b * p_.lse.batch + tile.h * p_.lse.head;
    uint32_t any = 0;
    for (int64_t lane = 0; lane < tile.columns; lane += Vec::kLanes) {
      uint32_t lanes = 0;
      for (int64_t i = 0; i < Vec::kLanes; ++i) {
        offset_[lane + i] = 0.0f;
        if (lane + i >= tile.queries.count) continue;
        const int64_t query = tile.queries[lane + i];
        const float lse = p_.lse.data[head + query * p_.lse.row];
        if (lse == -kInfinity || p_.ignores(b, query)) continue;
        offset_[lane + i] = lse;
        lanes |= 1u << i;
      }
      counted_[lane / Vec::kLanes] = uint16_t(lanes);
      any |= lanes;
    }
    if (any) {
      query_ = Packing<Float32Math>::lanes(Slice(p_.query, p_.type, b, tile.h), tile.queries,
                                           p_.head_dim, scaling_.factor, queries_);
    }
    return any;
  }

  void add(int64_t b, const QueryTile& tile, const Block& block, const LeftRows<Float32Math>& key,
           double* mass) {
    constexpr int64_t kLanes = Vec::kLanes;
    const int64_t columns = tile.columns;
    const Scores scores{p_, b, tile.h, tile.queries, columns, scores_};
    const float unit = multiply_scores(scores, block, key, query_, scaling_.unit, maximum_, shown_);
    for (int64_t first = 0; first < block.count; first += kLanes) {
      const int64_t count = block.count - first < kLanes ? block.count - first : kLanes;
      Vec sums[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        sums[r] = Vec::zero();
        if (r >= count) continue;
        const float* row = scores_ + (first + r) * columns;
        for (int64_t lane = 0; lane < columns; lane += kLanes) {
          const Vec weight = exponential(Vec::load(row + lane), unit, Vec::load(offset_ + lane));
          sums[r] = sums[r] + Vec::select(counted_[lane / kLanes], weight, Vec::zero());
        }
      }
      float totals[kLanes];
      Vec::totals(sums).store(totals);
      for (int64_t r = 0; r < count; ++r) mass[first + r] += double(totals[r]);
    }
  }

  const WeightStatistics& p_;
  Scaling scaling_;
  float *queries_, *offset_, *maximum_, *scores_, *keys_;
  double* mass_;
  uint16_t* shown_;
  int32_t* list_;
  uint16_t counted_[QueryTiles::kMost / Vec::kLanes];
  Right<Float32Math> query_;
};

// Groups of queries or keys, of all heads of all entries.
template <class Task>
void statistics_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& p = *static_cast<const WeightStatistics*>(context);
  Task task(p);
  if (!task.allocate()) return;
  const int64_t groups = Task::groups(p);
  for (int64_t i = begin; i < end; ++i)
    task.run(i / groups / p.heads, i / groups % p.heads, i % groups);
}

template <class HalfMath>
void weight_statistics(const WeightStatistics& p, ParallelFor parallel) {
  if constexpr (!kTakesAll<HalfMath>) return HalfMath::kFloat32->weight_statistics(p, parallel);
  const int64_t heads = p.batch * p.heads;
  const double flops =
      2.0 * double(heads) * double(p.q_len) * double(p.kv_len) * double(p.head_dim);
  run(parallel, heads * QueryStatisticsTask::groups(p), flops,
      statistics_tasks<QueryStatisticsTask>, p);
  if (!p.mass.data) return;
  run(parallel, heads * KeyStatisticsTask::groups(p), flops, statistics_tasks<KeyStatisticsTask>,
      p);
}

}  // namespace
}  // namespace ff
