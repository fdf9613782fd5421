// Attention from queries to keys and from keys to queries with the scores computed once.
//
// As in attention/forward.h, query tiles walk blocks of keys, and the queries' side is that of
// attention. For the keys' side the same score tile goes, before, through a softmax along its
// rows: it has a running maximum and sum per key and an accumulator for all keys of the head,
//     n' = max(n, max_i S)   O_k = O_k * exp(n - n') + exp(S - n')^T W   and so on.
//
// A padded position takes no part in the other side's sums but gets an output of its own. Query
// tiles and blocks are made of visible positions or of hidden ones, never of both: a score tile
// then serves either side as a whole, both or none, and nothing is computed to be thrown away.
//
// Lanes are the longer side: `exchanged` turns a call round. Every query tile adds to all sums of
// the keys and every block to all of a query tile, so score tiles are about as wide as long; and
// those of few keys are wider, since each step of an online softmax adds an error of 1e-7 to all of
// its weights.
#pragma once

#include <utility>

#include "cpu/attention/query_tiles.h"
#include "cpu/softmax/dropout.h"
#include "cpu/softmax/epilogue.h"
#include "cpu/task.h"

namespace ff {
namespace {

// Sizes of a score tile, by the number of keys.
struct ScoreTileSize {
  int64_t keys, queries;

  explicit ScoreTileSize(int64_t kv_len) {
    constexpr int64_t kFloats = 24576;  // 96 KB: the second cache feeds products fast enough
    keys = kv_len < 1 ? 1 : kv_len < 128 ? kv_len : 128;
    const int64_t lanes = kFloats / keys / Vec::kLanes * Vec::kLanes;
    queries = lanes < 256 ? lanes : 256;
  }

  int64_t floats() const { return keys * queries; }
};

// What the keys' side needs of a score tile: all bits set in the lanes of its queries.
inline Vec lanes_in_use(const Block& queries, int64_t lane) {
  Bool used[Vec::kLanes];
  for (int64_t i = 0; i < Vec::kLanes; ++i) used[i] = {lane + i < queries.count};
  return Vec::load_bool(used, Vec::kLanes);
}

// Calls body(lane, select) for each register of a row; select(a, b) is a, but b in lanes without a
// query.
template <class Body>
inline void for_lanes(const Scores& s, Vec last, const Body& body) {
  int64_t lane = 0;
  for (; lane + Vec::kLanes < s.columns; lane += Vec::kLanes)
    body(lane, [](Vec a, Vec) { return a; });
  body(lane, [last](Vec a, Vec b) { return Vec::select(last, a, b); });
}

// The largest scores of `count` keys, at most kLanes, from the `first` of a score tile on.
inline Vec key_maxima(const Scores& s, int64_t first, int64_t count, Vec last) {
  Vec largest[Vec::kLanes];
  for (int64_t r = 0; r < Vec::kLanes; ++r) {
    largest[r] = Vec::set(-kInfinity);
    if (r >= count) continue;
    const float* scores = s.data + (first + r) * s.columns;
    for_lanes(s, last, [&](int64_t lane, const auto& select) {
      largest[r] = Vec::max(select(Vec::load(scores + lane), largest[r]), largest[r]);
    });
  }
  return Vec::maxima(largest);
}

// The softmax of a score tile along its rows. The block's weights go to `weights`, as the left
// operand of the product with the queries' values, times the factors of dropout if there are any.
template <class Math, Base kBase>
inline void key_softmax(const Scores& s, const Block& block, float unit, const float* dropout,
                        float* weights, const Statistics& keys) {
  constexpr int64_t kLanes = Vec::kLanes;
  const Vec last = lanes_in_use(s.queries, s.columns - kLanes);
  for (int64_t first = 0; first < block.count; first += kLanes) {
    const int64_t count = block.count - first < kLanes ? block.count - first : kLanes;
    const Vec largest = key_maxima(s, first, count, last) * Vec::set(unit);
    const Vec maximum = Vec::load(keys.maximum + first, count), now = Vec::max(largest, maximum);
    const Vec rescale = exponential<Precision::kFloat32, kBase>(maximum, 1.0f, finite(now));
    now.store(keys.maximum + first, count);
    rescale.store(keys.rescale + first, count);
    float offsets[kLanes];
    finite(now).store(offsets);
    Vec sums[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      Vec sum = Vec::zero(), total = Vec::zero();
      if (r < count) {
        const int64_t at = (first + r) * s.columns;
        const Vec offset = Vec::set(offsets[r]);
        for_lanes(s, last, [&](int64_t lane, const auto& select) {
          if (lane % (kShortChain / 4 * kLanes) == 0) total = total + sum, sum = Vec::zero();
          const Vec score = Vec::load(s.data + at + lane);
          Vec weight = exponential<PackedWeights<Math>::kPrecision, kBase>(score, unit, offset);
          weight = select(weight, Vec::zero());
          sum = sum + weight;
          if (dropout) weight = weight * Vec::load(dropout + at + lane);
          PackedWeights<Math>::store_row(weights + at, lane, weight);
        });
      }
      sums[r] = total + sum;
    }
    const Vec before = Vec::load(keys.sum + first, count);
    Vec::fma(before, rescale, Vec::totals(sums)).store(keys.sum + first, count);
  }
}

// Whether a side is so short that errors of single scores are all there is to see.
inline bool has_few(const Bidirectional& p) {
  return p.q_len <= kDecodeLength || p.kv_len <= kDecodeLength;
}

constexpr int64_t kTilesAtOnce = 2;  // of queries, that share what is made of a block of keys

template <class Math>
class BidirectionalTask {
 public:
  using Call = BidirectionalForward;

  explicit BidirectionalTask(const BidirectionalForward& p)
      : p_(p),
        value_columns_(padded(p.value_dim)),
        query_value_columns_(padded(p.query_value_dim)),
        base_(base_of(p)),
        scaling_(scaling_of<Math>(p.scale, base_)),
        size_(p.kv_len) {}

  bool allocate() {
    const int64_t most = size_.queries;
    return carve(p_, {{&queries_, kTilesAtOnce * query_floats()},
                      {&query_values_, kTilesAtOnce * most * query_value_columns_},
                      {&outs_, kTilesAtOnce * most * value_columns_},
                      {&statistics_, kTilesAtOnce * 3 * most},
                      {&maximum_, most},
                      {&inverse_, most > size_.keys ? most : size_.keys},
                      {&scores_, size_.floats()},
                      {&weights_, size_.floats()},
                      {&factor_, p_.dropout ? size_.floats() : 0},
                      {&key_, size_.keys * padded(p_.head_dim)},
                      {&value_, size_.keys * value_columns_},
                      {&keys_.maximum, p_.kv_len},
                      {&keys_.sum, p_.kv_len},
                      {&keys_.rescale, p_.kv_len},
                      {&key_outs_, p_.kv_len * query_value_columns_},
                      {&query_list_, p_.query_padding ? p_.q_len : 0},
                      {&key_list_, p_.padding ? p_.kv_len : 0}});
  }

  void run(int64_t b, int64_t h) {
    const VisibleAndHidden queries = by_visibility(p_.query_padding, b * p_.query_padding_batch,
                                                   p_.query_padding_column, p_.q_len, query_list_);
    const VisibleAndHidden keys =
        by_visibility(p_.padding, b * p_.padding_batch, p_.padding_column, p_.kv_len, key_list_);
    keys_.clear(p_.kv_len);
    visible_queries_ = queries.visible.count;
    keys_direct_ = takes_registers(p_.out_k, all(keys.visible), p_.query_value_dim) &&
                   takes_registers(p_.out_k, all(keys.hidden), p_.query_value_dim);
    for (const bool visible : {true, false}) {
      const QueryTiles tiles(visible ? queries.visible : queries.hidden, size_.queries);
      for (int64_t first = 0; first < tiles.count; first += count_) {
        count_ = tiles.count - first < kTilesAtOnce ? tiles.count - first : kTilesAtOnce;
        for (int64_t i = 0; i < count_; ++i) start(b, h, tiles[first + i], visible, i);
        walk(b, h, keys.visible, 0, visible, true);
        if (visible) walk(b, h, keys.hidden, keys.visible.count, true, false);
        for (int64_t i = 0; i < count_; ++i) finish(b, h, tile_[i].queries, keys.visible.count, i);
      }
    }
    finish_keys(b, h, keys.visible, 0);
    finish_keys(b, h, keys.hidden, keys.visible.count);
  }

 private:
  int64_t query_floats() const { return (p_.head_dim + p_.head_dim % 2) * size_.queries; }

  float* out_of(int64_t i) const { return outs_ + i * size_.queries * value_columns_; }

  void start(int64_t b, int64_t h, const Block& queries, bool visible, int64_t i) {
    const int64_t most = size_.queries;
    float* statistics = statistics_ + i * 3 * most;
    tile_[i] = {queries, {statistics, statistics + most, statistics + 2 * most}};
    tile_[i].statistics.clear(padded(queries.count));
    query_[i] = Packing<Math>::lanes(Slice(p_.query, p_.type, b, h), queries, p_.head_dim,
                                     scaling_.factor, queries_ + i * query_floats());
    if (visible) {
      query_value_[i] =
          Packing<Math>::columns(Slice(p_.query_value, p_.type, b, h), queries, p_.query_value_dim,
                                 query_values_ + i * most * query_value_columns_);
    }
  }

  // The query tiles at hand against keys whose place in the statistics begins at `place`: for the
  // tiles, if these see the keys, and for the keys, if these see the queries.
  void walk(int64_t b, int64_t h, const Positions& keys, int64_t place, bool for_keys,
            bool for_queries) {
    const Slice key(p_.key, p_.type, b, h), value(p_.value, p_.type, b, h);
    for (int64_t done = 0; done < keys.count; done += size_.keys) {
      const Block block = block_at(keys, done, size_.keys);
      const auto key_rows = Packing<Math>::rows(key, block, p_.head_dim, key_);
      Right<Math> value_columns{};
      if (for_queries) {
        value_columns = Packing<Math>::columns(value, block, p_.value_dim, value_);
      }
      for (int64_t i = 0; i < count_; ++i) {
        const BidirectionalTile& tile = tile_[i];
        const Scores scores{p_, b, h, tile.queries, padded(tile.queries.count), scores_};
        const float unit = score(scores, block, key_rows, i);
        if (for_keys) attend_queries(scores, block, place + done, unit, i);
        if (for_queries) attend_keys(scores, block, value_columns, unit, i);
      }
    }
  }

  // Fills the scores and `maximum_`; returns their unit.
  float score(const Scores& scores, const Block& block, const LeftRows<Math>& key, int64_t i) {
    const int64_t steps = Packing<Math>::steps(p_.head_dim);
    if (has_few(p_)) {
      multiply_in_parts(key, query_[i], block.count, scores.columns, steps, scores_);
      make_scores_in_place(scores, block, base_, scaling_.unit, maximum_);
      return 1.0f;
    }
    const auto product = [&](const auto& epilogue) {
      multiply_dims(key, query_[i], block.count, scores.columns, steps, scores_, epilogue);
    };
    return make_scores(scores, block, base_, scaling_.unit, maximum_, nullptr, product);
  }

  void attend_queries(const Scores& scores, const Block& block, int64_t place, float unit,
                      int64_t i) {
    const Statistics keys{keys_.maximum + place, keys_.sum + place, keys_.rescale + place};
    if (p_.dropout) dropout_factors(scores, block, kColumnStream, factor_);
    const auto softmax =
        base_ == Base::kTwo ? key_softmax<Math, Base::kTwo> : key_softmax<Math, Base::kE>;
    softmax(scores, block, unit, p_.dropout ? factor_ : nullptr, weights_, keys);
    float* outs = key_outs_ + place * query_value_columns_;
    const bool ends = scores.queries.first + scores.queries.count == visible_queries_;
    const auto add = [&](int64_t from, int64_t some, bool last) {
      const auto weights = steps_from(from, PackedWeights<Math>::by_key(weights_, scores.columns));
      const auto product = [&](const auto& epilogue) {
        multiply(weights, steps_from(from, query_value_[i]), block.count, query_value_columns_,
                 some, epilogue);
      };
      const bool first = scores.queries.first + from == 0;
      if (keys_direct_ && ends && last) {
        store_product<Math>(p_.out_k, p_.type, scores.b, scores.h, block, p_.query_value_dim, keys,
                            first ? nullptr : outs, inverse_, product);
      } else {
        product(Rescale{outs, query_value_columns_, keys.rescale, first});
      }
    };
    sum_in_parts<Math>(Packing<Math>::steps(scores.queries.count), block.count, keys, add);
  }

  void attend_keys(const Scores& scores, const Block& block, const Right<Math>& value, float unit,
                   int64_t i) {
    const Statistics& statistics = tile_[i].statistics;
    if (p_.dropout) dropout_factors(scores, block, kRowStream, factor_);
    online_softmax<Math>(base_, block, scores.columns, unit, maximum_,
                         p_.dropout ? factor_ : nullptr, scores_, statistics);
    const auto product = [&](const auto& epilogue) {
      multiply(PackedWeights<Math>::by_query(scores_, scores.columns), value, scores.queries.count,
               value_columns_, Packing<Math>::steps(block.count), epilogue);
    };
    const bool first = block.first == 0, last = block.first + block.count == block.positions.count;
    if (last && takes_registers(p_.out_q, scores.queries, p_.value_dim)) {
      store_product<Math>(p_.out_q, p_.type, scores.b, scores.h, scores.queries, p_.value_dim,
                          statistics, first ? nullptr : out_of(i), inverse_, product);
    } else {
      product(Rescale{out_of(i), value_columns_, statistics.rescale, first});
    }
  }

  static Block all(const Positions& positions) { return {positions, 0, positions.count}; }

  void finish(int64_t b, int64_t h, const Block& queries, int64_t visible_keys, int64_t i) {
    const Statistics& statistics = tile_[i].statistics;
    for (int64_t e = 0; e < queries.count * value_columns_ && visible_keys == 0; ++e)
      out_of(i)[e] = 0.0f;
    if (visible_keys == 0 || !takes_registers(p_.out_q, queries, p_.value_dim)) {
      store_means(p_.out_q, p_.type, b, h, queries, p_.value_dim, statistics.sum, out_of(i));
    }
    store_lse(p_.lse_q, nullptr, b, h, queries, statistics, base_);
  }

  void finish_keys(int64_t b, int64_t h, const Positions& keys, int64_t place) {
    float* outs = key_outs_ + place * query_value_columns_;
    for (int64_t e = 0; e < keys.count * query_value_columns_ && visible_queries_ == 0; ++e)
      outs[e] = 0.0f;
    if (visible_queries_ == 0 || !keys_direct_) {
      store_means(p_.out_k, p_.type, b, h, all(keys), p_.query_value_dim, keys_.sum + place, outs);
    }
    const Statistics statistics{keys_.maximum + place, keys_.sum + place, keys_.rescale + place};
    store_lse(p_.lse_k, nullptr, b, h, all(keys), statistics, base_);
  }

  struct BidirectionalTile {
    Block queries;
    Statistics statistics;
  };

  const BidirectionalForward& p_;
  int64_t value_columns_, query_value_columns_, visible_queries_ = 0, count_ = 0;
  Base base_;
  Scaling scaling_;
  ScoreTileSize size_;
  float *queries_, *query_values_, *outs_, *statistics_, *maximum_, *scores_, *weights_, *factor_;
  float *key_, *value_, *key_outs_, *inverse_;
  Statistics keys_;   // visible keys first, then the hidden ones
  bool keys_direct_;  // their last product goes straight to the output
  int32_t *query_list_, *key_list_;
  BidirectionalTile tile_[kTilesAtOnce];
  Right<Math> query_[kTilesAtOnce], query_value_[kTilesAtOnce];
};

// The same call from the other side; dropout, windows and ALiBi know rows from columns.
template <class Call>
inline Call exchanged(Call p) {
  std::swap(p.q_len, p.kv_len);
  std::swap(p.value_dim, p.query_value_dim);
  std::swap(p.query, p.key);
  std::swap(p.value, p.query_value);
  std::swap(p.mask.row, p.mask.column);
  std::swap(p.padding, p.query_padding);
  std::swap(p.padding_batch, p.query_padding_batch);
  std::swap(p.padding_column, p.query_padding_column);
  return p;
}

inline bool wants_exchange(const Bidirectional& p) {
  return p.kv_len > p.q_len && !p.dropout && !p.windowed() && !p.alibi.data;
}

template <class HalfMath>
void bidirectional_forward(const BidirectionalForward& given, ParallelFor parallel) {
  if constexpr (!kTakesAll<HalfMath>) {
    if (!narrow_products(given)) return HalfMath::kFloat32->bidirectional_forward(given, parallel);
  }
  BidirectionalForward p = given;
  if (wants_exchange(given)) {
    p = exchanged(given);
    std::swap(p.out_q, p.out_k);
    std::swap(p.lse_q, p.lse_k);
  }
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(p.head_dim + p.value_dim + p.query_value_dim);
  auto* body = head_tasks<BidirectionalTask<HalfMath>>;
  ff::run(parallel, p.batch * p.heads, flops, body, HeadTasks<BidirectionalForward>{&p});
}

}  // namespace
}  // namespace ff
