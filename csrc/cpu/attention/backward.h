// Attention backward: the scores are computed again, block by block, so that no Lq x Lk tensor
// exists (Dao et al., "FlashAttention", 2022). With P the softmax and c the dropout factors:
//
//     dV = (P c)^T dO     dP = c * (dO V^T)     dS = P * (dP - delta + d lse)     d bias = dS
//     dQ = scale * dS K   dK = scale * dS^T Q   delta = sum_j P dP
//
// (d lse within delta would round it to the bits of dP, which may be much larger.)
//
// Neither P nor delta comes from what the forward saved. exp(S - lse) carries the rounding of lse
// into every weight of a row (5e-7 at lse = 8, three times the plain formula's error) and is wrong
// for rows of finfo.min, where lse has no bits left for log(count); rowsum(dO * out) carries the
// rounding of a 16-bit out. So a first pass over the keys takes the statistics of the online
// softmax and sum_j P dP; it keeps exp(S - m) and dP of a tile for the second, 384 bytes a key:
// to compute them again would take forward and backward of 1,500 keys 1.2 times as long.
//
// A task is a key head: it adds up dK and dV over its query heads and query tiles in a fixed order,
// so the bits do not depend on threads. Up to four tiles at a time walk the keys together and share
// what is made of a block. Where the gradient of a mask is summed over batch entries or heads,
// those are one task.
#pragma once

#include "cpu/softmax/dropout.h"
#include "cpu/softmax/epilogue.h"
#include "cpu/task.h"
#include "gradient_sums.h"
#include "query_tiles.h"

namespace ff {
namespace {

struct BackwardTile : QueryTile {
  float *query_t, *grad_t, *query, *grad, *grad_query;
  float *weighted, *grad_lse;  // sum_j P dP, then delta; d lse
};

template <class Math>
class BackwardTask {
 public:
  using Call = AttentionBackward;

  explicit BackwardTask(const AttentionBackward& p)
      : p_(p),
        dim_(padded(p.head_dim)),
        value_dim_(padded(p.value_dim)),
        scaling_(scaling_of<Math>(p.scale, Base::kE)),
        grad_scale_(p.scale),
        blocks_((p.kv_len + kBlock - 1) / kBlock) {
    const int64_t fitting = kKept / (2 * QueryTiles::kMost * (p.kv_len + 1));
    most_ = fitting < 1 ? 1 : fitting < kTileGroup ? fitting : kTileGroup;
  }

  bool allocate() {
    constexpr int64_t kMost = QueryTiles::kMost;
    return carve(p_, {{&tiles_, most_ * tile_floats()},
                      {&maximum_, kMost},
                      {&scores_, most_ * p_.kv_len * kMost},
                      {&grad_scores_, most_ * p_.kv_len * kMost},
                      {&derivative_, p_.softcap > 0.0f ? most_ * p_.kv_len * kMost : 0},
                      {&maxima_, most_ * blocks_ * kMost},
                      {&pairs_, Math::kDepth > 1 ? kBlock / 2 * kMost : 0},
                      {&factor_, p_.dropout ? kBlock * kMost : 0},
                      {&key_, kBlock * dim_},
                      {&key_columns_, kBlock * dim_},
                      {&value_, kBlock * value_dim_},
                      {&grad_key_, kBlock * dim_},
                      {&grad_value_, kBlock * value_dim_},
                      {&key_sums_, p_.kv_len * dim_},
                      {&value_sums_, p_.kv_len * value_dim_},
                      {&list_, p_.padding ? p_.kv_len : 0}});
  }

  void run(int64_t b, int64_t group) {
    const Positions keys = visible_keys(p_, b, 0, p_.kv_len, list_);
    const int64_t members = p_.heads / p_.kv_heads;
    const QueryTiles tiles = all_query_tiles(p_);
    const int64_t total = members * tiles.count;
    one_group_ = 0 < total && total <= most_;
    for (int64_t i = 0; i < keys.count * dim_ && !one_group_; ++i) key_sums_[i] = 0.0;
    for (int64_t i = 0; i < keys.count * value_dim_ && !one_group_; ++i) value_sums_[i] = 0.0;
    for (int64_t first = 0; first < total; first += count_) {
      count_ = total - first < most_ ? total - first : most_;
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t tile = first + i;
        start(b, group * members + tile / tiles.count, tiles[tile % tiles.count], i);
      }
      walk(b, group, keys);
    }
    if (!one_group_) write_sums(b, group, keys);
    if (keys.count < p_.kv_len) clear_hidden(b, group, keys);
  }

 private:
  static constexpr int64_t kKept = 1 << 18;  // floats that more than one tile may keep: 1 MB

  int64_t tile_floats() const {
    return QueryTiles::kMost * (3 * dim_ + 2 * value_dim_ + 2 * Vec::kLanes + 5);
  }

  void start(int64_t b, int64_t h, const Block& queries, int64_t i) {
    constexpr int64_t kMost = QueryTiles::kMost;
    BackwardTile& tile = tile_[i];
    float* next = tiles_ + i * tile_floats();
    const auto take = [&](int64_t floats) { return (next += floats) - floats; };
    tile.h = h, tile.queries = queries, tile.columns = padded(queries.count);
    tile.query_t = take(kMost * (dim_ + Vec::kLanes));
    tile.grad_t = take(kMost * (value_dim_ + Vec::kLanes));
    tile.query = take(kMost * dim_), tile.grad = take(kMost * value_dim_);
    tile.grad_query = take(kMost * dim_);
    tile.statistics = {take(kMost), take(kMost), take(kMost)};
    tile.weighted = take(kMost), tile.grad_lse = take(kMost);
    const Slice query(p_.query, p_.type, b, h), grad(p_.grad_out, p_.type, b, h);
    query_t_[i] = Packing<Math>::lanes(query, queries, p_.head_dim, scaling_.factor, tile.query_t);
    grad_t_[i] = Packing<Math>::lanes(grad, queries, p_.value_dim, 1.0f, tile.grad_t);
    query_[i] = Packing<Math>::columns(query, queries, p_.head_dim, tile.query);
    grad_[i] = Packing<Math>::columns(grad, queries, p_.value_dim, tile.grad);
    for (int64_t e = 0; e < tile.columns; ++e) tile.weighted[e] = 0.0f;
    tile.statistics.begin(tile.columns, {p_, h, Base::kE});
  }

  // All blocks for the tiles at hand, for the statistics and then for the gradients; a block that
  // is the only one stays in the first cache in between, tile by tile.
  void walk(int64_t b, int64_t group, const Positions& keys) {
    const Slice key(p_.key, p_.type, b, group), value(p_.value, p_.type, b, group);
    for (int64_t i = 0; i < count_; ++i) look<Math>(p_, b, keys, tile_[i]);
    const bool one_block = keys.count <= kBlock;
    for (int pass = 0; pass < 2 - one_block; ++pass) {
      const bool first = pass == 0, last = pass == 1 || one_block;
      for (int64_t done = 0; done < keys.count; done += kBlock) {
        const Block block = block_at(keys, done);
        if (!sees(block)) {
          if (last && one_group_) store_gradients(b, group, block, true);
          continue;
        }
        LeftRows<Math> key_rows{}, value_rows{};
        Right<Math> key_columns{};
        if (first) {
          key_rows = Packing<Math>::rows(key, block, p_.head_dim, key_);
          value_rows = Packing<Math>::rows(value, block, p_.value_dim, value_);
        }
        if (last) {
          key_columns = Packing<Math>::columns(key, block, p_.head_dim, key_columns_);
          // The first tile stores what it sees, and the others add to it.
          const Block stored = seen(tile_[0], block);
          const int64_t skipped = stored.count > 0 ? stored.first - done : 0;
          clear_gradients(0, skipped);
          clear_gradients(skipped + (stored.count > 0 ? stored.count : 0), block.count);
        }
        for (int64_t i = 0; i < count_; ++i) {
          const Block some = seen(tile_[i], block);
          const int64_t skipped = some.first - done;
          const Kept at = kept(one_block ? 0 : i, tile_[i], some);
          if (first && some.count > 0) {
            products(b, i, some, at, rows_from(skipped, key_rows), rows_from(skipped, value_rows));
          }
          if (one_block && some.count > 0) finish_statistics(b, tile_[i]);
          if (last && some.count > 0) {
            gradients(b, i, some, skipped, at,
                      steps_from(Packing<Math>::steps(skipped), key_columns));
          }
        }
        if (last && one_group_) {
          store_gradients(b, group, block, false);
        } else if (last) {
          add(key_sums_ + done * dim_, grad_key_, block.count * dim_);
          add(value_sums_ + done * value_dim_, grad_value_, block.count * value_dim_);
        }
      }
      for (int64_t i = 0; i < count_ && !last; ++i) finish_statistics(b, tile_[i]);
    }
    for (int64_t i = 0; i < count_; ++i) {
      const BackwardTile& tile = tile_[i];
      if (one_block && tile.sees_none()) finish_statistics(b, tile);
      for (int64_t e = 0; e < tile.queries.count * dim_ && tile.sees_none(); ++e)
        tile.grad_query[e] = 0.0f;
      const auto scale = [this](int64_t) { return grad_scale_.sums; };
      store_rows(p_.grad_query, p_.type, b, tile.h, tile.queries, p_.head_dim, scale,
                 tile.grad_query);
    }
  }

  bool sees(const Block& block) const {
    for (int64_t i = 0; i < count_; ++i)
      if (seen(tile_[i], block).count > 0) return true;
    return false;
  }

  // Rows first .. end of a block's sums.
  void clear_gradients(int64_t first, int64_t end) const {
    for (int64_t e = first * dim_; e < end * dim_; ++e) grad_key_[e] = 0.0f;
    for (int64_t e = first * value_dim_; e < end * value_dim_; ++e) grad_value_[e] = 0.0f;
  }

  // A block's sums to the gradients, or zeros of keys that no query sees.
  void store_gradients(int64_t b, int64_t group, const Block& block, bool none) const {
    const auto same = [](int64_t) { return 1.0f; };
    const auto scale = [this](int64_t) { return grad_scale_.sums; };
    if (none) clear_gradients(0, block.count);
    store_rows(p_.grad_key, p_.type, b, group, block, p_.head_dim, scale, grad_key_);
    store_rows(p_.grad_value, p_.type, b, group, block, p_.value_dim, same, grad_value_);
  }

  // What a tile keeps of a block.
  struct Kept {
    float *scores, *grad_scores, *maxima, *derivative;
  };

  Kept kept(int64_t i, const QueryTile& tile, const Block& block) const {
    const int64_t at = i * p_.kv_len * QueryTiles::kMost + block.first * tile.columns;
    return {scores_ + at, grad_scores_ + at,
            maxima_ + (i * blocks_ + block.first / kBlock) * QueryTiles::kMost,
            p_.softcap > 0.0f ? derivative_ + at : nullptr};
  }

  // exp(S - m) and dP of a block, the latter with its dropout factors, and the statistics so far:
  // m, l and sum_j exp(S - m) dP.
  void products(int64_t b, int64_t i, const Block& block, const Kept& to, const LeftRows<Math>& key,
                const LeftRows<Math>& value) {
    const BackwardTile& tile = tile_[i];
    const int64_t columns = tile.columns;
    const Scores scores{p_, b, tile.h, tile.queries, columns, to.scores, to.derivative};
    const auto product = [&](const auto& epilogue) {
      multiply_dims(key, query_t_[i], block.count, columns, Packing<Math>::steps(p_.head_dim),
                    to.scores, epilogue);
    };
    const float unit =
        make_scores(scores, block, Base::kE, scaling_.unit, maximum_, nullptr, product);
    multiply_dims(value, grad_t_[i], block.count, columns, Packing<Math>::steps(p_.value_dim),
                  to.grad_scores, Store{to.grad_scores, columns});
    if (p_.dropout) {
      dropout_factors(scores, block, kRowStream, factor_);
      for (int64_t e = 0; e < block.count * columns; e += Vec::kLanes)
        (Vec::load(to.grad_scores + e) * Vec::load(factor_ + e)).store(to.grad_scores + e);
    }
    online_softmax<Float32Math, Base::kE>(block, columns, unit, maximum_, nullptr, to.scores,
                                          tile.statistics);
    for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
      Vec::load(tile.statistics.maximum + lane).store(to.maxima + lane);
      Vec sum[1];
      add_short_chains(
          block.count,
          [&](int64_t j, Vec(&part)[1]) __attribute__((always_inline)) {
            const int64_t e = j * columns + lane;
            part[0] = Vec::fma(Vec::load(to.scores + e), Vec::load(to.grad_scores + e), part[0]);
          },
          sum);
      Vec::fma(Vec::load(tile.weighted + lane), Vec::load(tile.statistics.rescale + lane), sum[0])
          .store(tile.weighted + lane);
    }
  }

  // From sums to what the gradients multiply and subtract: 1 / l in `sum`, delta in `weighted`.
  // What they are for sinks goes to theirs.
  void finish_statistics(int64_t b, const BackwardTile& tile) {
    const FirstStatistics sink(p_, tile.h, Base::kE);
    double grad_sink = 0.0;
    for (int64_t i = 0; i < tile.columns; ++i) {
      float& sum = tile.statistics.sum[i];
      const bool dead = sum == 0.0f || i >= tile.queries.count;  // then P = 0
      tile.weighted[i] = dead ? 0.0f : tile.weighted[i] / sum;
      tile.grad_lse[i] = dead ? 0.0f : p_.grad_lse.at(b, tile.h, tile.queries[i]);
      sum = dead ? 0.0f : inverse(sum);
      if (dead || sink.sum == 0.0f) continue;
      const float weight = std::exp(sink.maximum - tile.statistics.maximum[i]) * sum;
      grad_sink += double(weight * ((0.0f - tile.weighted[i]) + tile.grad_lse[i]));
    }
    if (p_.grad_sinks) p_.grad_sinks[b * p_.grad_sinks_batch + tile.h] += grad_sink;
  }

  // P c in the place of exp(S - m), dS in that of dP, and what they add to the gradients, those of
  // the keys from row `place` on.
  void gradients(int64_t b, int64_t i, const Block& block, int64_t place, const Kept& at,
                 const Right<Math>& key) {
    const BackwardTile& tile = tile_[i];
    const int64_t columns = tile.columns;
    if (p_.dropout) {
      dropout_factors({p_, b, tile.h, tile.queries, columns, at.scores}, block, kRowStream,
                      factor_);
    }
    for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
      const Vec offset = finite(Vec::load(tile.statistics.maximum + lane));
      const Vec since = exponential(Vec::load(at.maxima + lane), 1.0f, offset);
      const Vec factor = since * Vec::load(tile.statistics.sum + lane);
      const Vec delta = Vec::load(tile.weighted + lane);
      const Vec grad_lse = Vec::load(tile.grad_lse + lane);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t e = j * columns + lane;
        const Vec weight = Vec::load(at.scores + e) * factor;
        const Vec grad = (Vec::load(at.grad_scores + e) - delta) + grad_lse;
        (weight * grad).store(at.grad_scores + e);
        (p_.dropout ? weight * Vec::load(factor_ + e) : weight).store(at.scores + e);
      }
    }
    for (int64_t row = 0; row < tile.queries.count; ++row)
      add_mask_gradient(p_.grad_mask, b, tile.h, tile.queries[row], block, at.grad_scores + row,
                        columns);
    add_position_gradient(p_.grad_positions, b, tile.h, tile.queries, block, at.grad_scores,
                          columns);
    if (at.derivative) through_cap(at.derivative, block.count * columns, at.grad_scores);
    grad_scale_.apply(block.count * columns, at.grad_scores);

    PackedGradients<Math>::store_pairs(block.count, columns, at.grad_scores, pairs_);
    PackedGradients<Math>::round_rows(block.count, columns, at.scores);
    PackedGradients<Math>::round_rows(block.count, columns, at.grad_scores);
    const int64_t steps = Packing<Math>::steps(tile.queries.count);
    multiply(PackedWeights<Math>::by_key(at.scores, columns), grad_[i], block.count, value_dim_,
             steps, Add{grad_value_ + place * value_dim_, value_dim_, i == 0});
    const auto by_key = PackedWeights<Math>::by_key(at.grad_scores, columns);
    multiply(by_key, query_[i], block.count, dim_, steps,
             Add{grad_key_ + place * dim_, dim_, i == 0});
    multiply(PackedGradients<Math>::by_query(at.grad_scores, pairs_, columns), key,
             tile.queries.count, dim_, Packing<Math>::steps(block.count),
             Add{tile.grad_query, dim_, block.first == tile.begin});
  }

  void write_row(const MutableView& to, int64_t b, int64_t group, int64_t j, int64_t count,
                 const float* from) const {
    store(to.data, p_.type, b * to.batch + group * to.head + j * to.row, to.column, count, 1.0f,
          from);
  }

  void write_sums(int64_t b, int64_t group, const Positions& keys) {
    const auto row = [&](const MutableView& to, int64_t i, int64_t count, const double* from,
                         double factor, float* buffer) {
      for (int64_t c = 0; c < count; ++c) buffer[c] = float(from[c] * factor);
      write_row(to, b, group, keys[i], count, buffer);
    };
    for (int64_t i = 0; i < keys.count; ++i) {
      row(p_.grad_key, i, p_.head_dim, key_sums_ + i * dim_, double(grad_scale_.sums), grad_key_);
      row(p_.grad_value, i, p_.value_dim, value_sums_ + i * value_dim_, 1.0, grad_value_);
    }
  }

  void clear_hidden(int64_t b, int64_t group, const Positions& keys) {
    for (int64_t e = 0; e < dim_; ++e) grad_key_[e] = 0.0f;
    for (int64_t e = 0; e < value_dim_; ++e) grad_value_[e] = 0.0f;
    for (int64_t j = 0, next = 0; j < p_.kv_len; ++j) {
      const bool visible = next < keys.count && keys[next] == j;
      next += visible;
      if (visible) continue;
      write_row(p_.grad_key, b, group, j, p_.head_dim, grad_key_);
      write_row(p_.grad_value, b, group, j, p_.value_dim, grad_value_);
    }
  }

  const AttentionBackward& p_;
  int64_t dim_, value_dim_, count_ = 0;
  Scaling scaling_;
  GradientScale grad_scale_;
  int64_t blocks_, most_;   // blocks of keys, tiles at a time
  bool one_group_ = false;  // of tiles: the gradients of a block are then complete
  float *tiles_, *maximum_, *scores_, *grad_scores_, *derivative_, *maxima_, *pairs_, *factor_;
  float *key_, *key_columns_, *value_, *grad_key_, *grad_value_;  // of a block
  double *key_sums_, *value_sums_;
  int32_t* list_;
  BackwardTile tile_[kTileGroup];
  Right<Math> query_t_[kTileGroup], grad_t_[kTileGroup], query_[kTileGroup], grad_[kTileGroup];
};

}  // namespace
}  // namespace ff
