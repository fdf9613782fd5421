// Gradients of bidirectional attention, with the scores computed once for both directions. With P
// the softmax over keys and R that over queries (dropout factors c and d), W the queries' values:
//
//     dV = (P c)^T dO_q      dP = c * (dO_q V^T)      delta = sum_j P dP
//     dW = (R d) dO_k        dR = d * (W dO_k^T)      gamma = sum_i R dR
//     dS = P * (dP - delta + d lse_q) + R * (dR - gamma + d lse_k)      d bias = dS
//     dQ = scale * dS K      dK = scale * dS^T Q
//
// dS is summed before the products: where a row has few scores its two parts nearly cancel, and
// products of each would be rounded first.
//
// Three passes over the score tiles of a head: the maxima of rows and columns, their sums, the
// gradients. An online softmax would save the first and rescale every sum of the keys once per
// tile, which makes dV twice as wrong as the plain formula. The score tiles of a short head, S, dP
// and dR, are kept in between; those of a long one are computed again.
#pragma once

#include "cpu/attention/backward.h"
#include "statistics.h"

namespace ff {
namespace {

template <class Math>
class BidirectionalBackwardTask {
 public:
  using Call = BidirectionalBackward;

  explicit BidirectionalBackwardTask(const BidirectionalBackward& p)
      : p_(p),
        dim_(padded(p.head_dim)),
        value_dim_(padded(p.value_dim)),
        query_value_dim_(padded(p.query_value_dim)),
        rows_size_(padded(p.q_len) + Vec::kLanes),
        masked_(has_few(p) || p.mask.data || p.windowed() || is_shaped(p)),
        scaling_(scaling_of<Math>(p.scale, Base::kE)),
        grad_scale_(p.scale),
        unit_(masked_ ? 1.0f : scaling_.unit),
        size_(p.kv_len),
        keeps_(3 * p.kv_len * rows_size_ <= kKept) {}

  bool allocate() {
    const int64_t scores = keeps_ ? rows_size_ * p_.kv_len : size_.floats();
    const int64_t pairs = Math::kDepth > 1 ? (size_.keys + 1) / 2 * size_.queries : 0;
    const int64_t factors = p_.dropout ? size_.floats() : 0;
    return carve(p_, {{&tile_memory_, kTilesAtOnce * tile_floats()},
                      {&maximum_, size_.queries},
                      {&kept_.scores, scores},
                      {&kept_.grad_rows, scores},
                      {&kept_.grad_columns, scores},
                      {&kept_.derivative, p_.softcap > 0.0f ? scores : 0},
                      {&pairs_, pairs},
                      {&column_pairs_, pairs},
                      {&factor_, factors},
                      {&column_factor_, factors},
                      {&rows_.maximum, rows_size_},
                      {&rows_.sum, rows_size_},
                      {&rows_.weighted, rows_size_},
                      {&rows_.grad_lse, rows_size_},
                      {&keys_.maximum, p_.kv_len},
                      {&keys_.sum, p_.kv_len},
                      {&keys_.weighted, p_.kv_len},
                      {&keys_.grad_lse, p_.kv_len},
                      {&key_, size_.keys * dim_},
                      {&key_columns_, size_.keys * dim_},
                      {&value_, size_.keys * value_dim_},
                      {&grad_, size_.keys * query_value_dim_},
                      {&grad_columns_, size_.keys * query_value_dim_},
                      {&grad_key_, size_.keys * dim_},
                      {&grad_value_, size_.keys * value_dim_},
                      {&key_sums_, p_.kv_len * dim_},
                      {&value_sums_, p_.kv_len * value_dim_},
                      {&query_list_, p_.query_padding ? p_.q_len : 0},
                      {&key_list_, p_.padding ? p_.kv_len : 0}});
  }

  void run(int64_t b, int64_t h) {
    b_ = b, h_ = h;
    queries_ = by_visibility(p_.query_padding, b * p_.query_padding_batch, p_.query_padding_column,
                             p_.q_len, query_list_);
    all_keys_ =
        by_visibility(p_.padding, b * p_.padding_batch, p_.padding_column, p_.kv_len, key_list_);
    rows_.clear(rows_size_);
    keys_.clear(p_.kv_len);
    for (int64_t i = 0; i < p_.kv_len * dim_; ++i) key_sums_[i] = 0.0;
    for (int64_t i = 0; i < p_.kv_len * value_dim_; ++i) value_sums_[i] = 0.0;
    pass(Pass::kMaxima);
    pass(Pass::kSums);
    const Positions &visible = all_keys_.visible, &hidden = all_keys_.hidden;
    keys_.finish({visible, 0, visible.count}, p_.grad_lse_k, b, h);
    keys_.at(visible.count).finish({hidden, 0, hidden.count}, p_.grad_lse_k, b, h);
    pass(Pass::kGradients);
    write_keys(visible, 0);
    write_keys(hidden, visible.count);
  }

 private:
  static constexpr int64_t kKept = 1 << 19;  // floats of score tiles that a head may keep: 2 MB

  enum class Pass { kMaxima, kSums, kGradients };

  struct BackwardTile {
    Block queries;
    int64_t columns, place;  // of its first query among all, in whole registers
    SideStatistics rows;
    Right<Math> query_t, grad_t, value_t, query, grad;
    float *grad_query, *grad_value;
  };

  // The keys of a score tile: whether they and the queries are visible says whom it serves.
  struct KeyBlock {
    Block block;
    int64_t place;  // of the first key among all
    bool for_queries, for_keys;
    LeftRows<Math> key{}, value{}, grad{};  // of K, V and dO_k, as far as the pass wants them
    Right<Math> key_columns{}, grad_columns{};
  };

  bool multiplies() const { return pass_ == Pass::kMaxima || !keeps_; }
  bool multiplies_gradients() const { return (pass_ == Pass::kMaxima) == keeps_; }

  int64_t tile_floats() const {
    const int64_t transposed = 3 * Vec::kLanes;  // what odd dims may add
    return size_.queries * (3 * dim_ + 2 * value_dim_ + 2 * query_value_dim_ + transposed);
  }

  // All score tiles, a few query tiles at a time, of visible queries or of hidden ones.
  void pass(Pass which) {
    pass_ = which;
    int64_t place = 0;
    for (const bool visible : {true, false}) {
      const QueryTiles tiles(visible ? queries_.visible : queries_.hidden, size_.queries);
      for (int64_t first = 0; first < tiles.count; first += count_) {
        count_ = tiles.count - first < kTilesAtOnce ? tiles.count - first : kTilesAtOnce;
        for (int64_t i = 0; i < count_; ++i) place = start(tiles[first + i], place, i);
        const Positions &seen = all_keys_.visible, &hidden = all_keys_.hidden;
        for (int64_t done = 0; done < seen.count; done += size_.keys)
          serve({block_at(seen, done, size_.keys), done, true, visible});
        for (int64_t done = 0; done < hidden.count && visible; done += size_.keys)
          serve({block_at(hidden, done, size_.keys), seen.count + done, false, true});
        for (int64_t i = 0; i < count_; ++i) finish(tile_[i]);
      }
    }
  }

  Slice slice(const View& view) const { return Slice(view, p_.type, b_, h_); }

  // Prepares what the pass wants of a query tile; returns the place of the next.
  int64_t start(const Block& queries, int64_t place, int64_t i) {
    float* next = tile_memory_ + i * tile_floats();
    const auto take = [&](int64_t floats) {
      return (next += floats * size_.queries) - floats * size_.queries;
    };
    const auto transposed = [&](const View& view, int64_t dim, float factor) {
      return Packing<Math>::lanes(slice(view), queries, dim, factor,
                                  take(padded(dim) + Vec::kLanes));
    };
    const auto columns = [&](const View& view, int64_t dim) {
      return Packing<Math>::columns(slice(view), queries, dim, take(padded(dim)));
    };
    BackwardTile& tile = tile_[i];
    tile.queries = queries, tile.columns = padded(queries.count), tile.place = place;
    tile.rows = rows_.at(place);
    if (multiplies()) tile.query_t = transposed(p_.query, p_.head_dim, scaling_.factor);
    if (multiplies_gradients()) {
      tile.grad_t = transposed(p_.grad_out_q, p_.value_dim, 1.0f);
      tile.value_t = transposed(p_.query_value, p_.query_value_dim, 1.0f);
    }
    if (pass_ == Pass::kGradients) {
      tile.query = columns(p_.query, p_.head_dim);
      tile.grad = columns(p_.grad_out_q, p_.value_dim);
      tile.grad_query = take(dim_), tile.grad_value = take(query_value_dim_);
      for (int64_t e = 0; e < queries.count * dim_; ++e) tile.grad_query[e] = 0.0f;
      for (int64_t e = 0; e < queries.count * query_value_dim_; ++e) tile.grad_value[e] = 0.0f;
    }
    return place + tile.columns;
  }

  void finish(const BackwardTile& tile) {
    if (pass_ == Pass::kSums) tile.rows.finish(tile.queries, p_.grad_lse_q, b_, h_);
    if (pass_ == Pass::kGradients) write_queries(tile);
  }

  // The query tiles at hand against the keys of a block.
  void serve(KeyBlock keys) {
    const Block& block = keys.block;
    if (multiplies()) keys.key = Packing<Math>::rows(slice(p_.key), block, p_.head_dim, key_);
    if (multiplies_gradients() && keys.for_queries) {
      keys.value = Packing<Math>::rows(slice(p_.value), block, p_.value_dim, value_);
    }
    if (multiplies_gradients() && keys.for_keys) {
      keys.grad = Packing<Math>::rows(slice(p_.grad_out_k), block, p_.query_value_dim, grad_);
    }
    if (pass_ == Pass::kGradients) {
      keys.key_columns = Packing<Math>::columns(slice(p_.key), block, p_.head_dim, key_columns_);
      if (keys.for_keys) {
        keys.grad_columns =
            Packing<Math>::columns(slice(p_.grad_out_k), block, p_.query_value_dim, grad_columns_);
      }
      for (int64_t e = 0; e < block.count * dim_; ++e) grad_key_[e] = 0.0f;
      for (int64_t e = 0; e < block.count * value_dim_; ++e) grad_value_[e] = 0.0f;
    }
    for (int64_t i = 0; i < count_; ++i) {
      const BackwardTile& tile = tile_[i];
      const int64_t place = keeps_ ? tile.place * p_.kv_len + keys.place * tile.columns : 0;
      const ScoreTile at{kept_.scores + place, kept_.grad_rows + place, kept_.grad_columns + place,
                         p_.softcap > 0.0f ? kept_.derivative + place : nullptr};
      const Scores scores{p_, b_, h_, tile.queries, tile.columns, at.scores, at.derivative};
      if (multiplies()) products(scores, tile, keys, at);
      const SideStatistics rows = tile.rows, columns = keys_.at(keys.place);
      if (pass_ == Pass::kMaxima) {
        add_maxima(scores, block, unit_, maximum_, keys.for_queries ? &rows : nullptr,
                   keys.for_keys ? &columns : nullptr);
      } else if (pass_ == Pass::kSums) {
        if (keys.for_queries) add_row_sums(scores, block, unit_, at.grad_rows, rows);
        if (keys.for_keys) add_column_sums(scores, block, unit_, at.grad_columns, columns);
      } else {
        score_gradients(scores, tile, keys, at);
        add_gradients(tile, keys, at);
      }
    }
    if (pass_ == Pass::kGradients) {
      add(key_sums_ + keys.place * dim_, grad_key_, block.count * dim_);
      add(value_sums_ + keys.place * value_dim_, grad_value_, block.count * value_dim_);
    }
  }

  // S with the mask, and what of dP and dR the score tile serves, with their dropout factors.
  void products(const Scores& scores, const BackwardTile& tile, const KeyBlock& keys,
                const ScoreTile& at) {
    const Block& block = keys.block;
    const int64_t columns = tile.columns;
    for (int64_t e = 0; e < columns; ++e) maximum_[e] = -kInfinity;
    const int64_t steps = Packing<Math>::steps(p_.head_dim);
    const bool few = has_few(p_);
    if (few) {
      multiply_in_parts(keys.key, tile.query_t, block.count, columns, steps, at.scores);
    } else {
      multiply_dims(keys.key, tile.query_t, block.count, columns, steps, at.scores,
                    StoreMaximum{at.scores, columns, maximum_});
    }
    if (masked_) make_scores_in_place(scores, block, Base::kE, scaling_.unit, maximum_);
    const auto gradients = [&](const LeftRows<Math>& left, const Right<Math>& right, int64_t dim,
                               uint32_t stream, float* to) {
      const int64_t steps = Packing<Math>::steps(dim);
      if (few) {
        multiply_in_parts(left, right, block.count, columns, steps, to);
      } else {
        multiply_dims(left, right, block.count, columns, steps, to, Store{to, columns});
      }
      if (!p_.dropout) return;
      dropout_factors(scores, block, stream, factor_);
      for (int64_t e = 0; e < block.count * columns; e += Vec::kLanes)
        (Vec::load(to + e) * Vec::load(factor_ + e)).store(to + e);
    };
    if (!multiplies_gradients()) return;
    if (keys.for_queries)
      gradients(keys.value, tile.grad_t, p_.value_dim, kRowStream, at.grad_rows);
    if (keys.for_keys)
      gradients(keys.grad, tile.value_t, p_.query_value_dim, kColumnStream, at.grad_columns);
  }

  // P c in the place of dP, R d in that of dR, dS in that of S.
  void score_gradients(const Scores& scores, const BackwardTile& tile, const KeyBlock& key_block,
                       const ScoreTile& at) {
    const SideStatistics queries = tile.rows, keys = keys_.at(key_block.place);
    const bool for_queries = key_block.for_queries, for_keys = key_block.for_keys;
    const Block& block = key_block.block;
    if (p_.dropout && for_queries) dropout_factors(scores, block, kRowStream, factor_);
    if (p_.dropout && for_keys) dropout_factors(scores, block, kColumnStream, column_factor_);
    for (int64_t lane = 0; lane < tile.columns; lane += Vec::kLanes) {
      const Vec used = lanes_in_use(tile.queries, lane);
      const Vec maximum = finite(Vec::load(queries.maximum + lane));
      const Vec divisor = Vec::load(queries.sum + lane);
      const Vec delta = Vec::load(queries.weighted + lane);
      const Vec grad_lse = Vec::load(queries.grad_lse + lane);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t e = j * tile.columns + lane;
        const Vec score = Vec::load(at.scores + e);
        Vec total = Vec::zero();
        if (for_queries) {
          const Vec weight = Vec::select(used, exponential(score, unit_, maximum) * divisor, total);
          total = weight * ((Vec::load(at.grad_rows + e) - delta) + grad_lse);
          (p_.dropout ? weight * Vec::load(factor_ + e) : weight).store(at.grad_rows + e);
        }
        if (for_keys) {
          const Vec offset = finite(Vec::set(keys.maximum[j]));
          const Vec every = exponential(score, unit_, offset) * Vec::set(keys.sum[j]);
          const Vec weight = Vec::select(used, every, Vec::zero());
          const Vec grad = (Vec::load(at.grad_columns + e) - Vec::set(keys.weighted[j])) +
                           Vec::set(keys.grad_lse[j]);
          total = Vec::fma(weight, grad, total);
          (p_.dropout ? weight * Vec::load(column_factor_ + e) : weight).store(at.grad_columns + e);
        }
        total.store(at.scores + e);
      }
    }
    for (int64_t row = 0; row < tile.queries.count; ++row)
      add_mask_gradient(p_.grad_mask, b_, h_, tile.queries[row], block, at.scores + row,
                        tile.columns);
    if (at.derivative) through_cap(at.derivative, block.count * tile.columns, at.scores);
    grad_scale_.apply(block.count * tile.columns, at.scores);
  }

  void add_gradients(const BackwardTile& tile, const KeyBlock& keys, const ScoreTile& at) {
    using Grads = PackedGradients<Math>;
    const int64_t count = keys.block.count;
    const int64_t columns = tile.columns, queries = tile.queries.count;
    const int64_t steps = Packing<Math>::steps(queries);
    const int64_t key_steps = Packing<Math>::steps(count);
    Grads::store_pairs(count, columns, at.scores, pairs_);
    Grads::round_rows(count, columns, at.scores);
    multiply(PackedWeights<Math>::by_key(at.scores, columns), tile.query, count, dim_, steps,
             Add{grad_key_, dim_});
    multiply(Grads::by_query(at.scores, pairs_, columns), keys.key_columns, queries, dim_,
             key_steps, Add{tile.grad_query, dim_});
    if (keys.for_queries) {
      Grads::round_rows(count, columns, at.grad_rows);
      multiply(PackedWeights<Math>::by_key(at.grad_rows, columns), tile.grad, count, value_dim_,
               steps, Add{grad_value_, value_dim_});
    }
    if (keys.for_keys) {
      Grads::store_pairs(count, columns, at.grad_columns, column_pairs_);
      multiply(Grads::by_query(at.grad_columns, column_pairs_, columns), keys.grad_columns, queries,
               query_value_dim_, key_steps, Add{tile.grad_value, query_value_dim_});
    }
  }

  void write_row(const MutableView& to, int64_t i, int64_t count, float factor,
                 const float* from) const {
    store(to.data, p_.type, b_ * to.batch + h_ * to.head + i * to.row, to.column, count, factor,
          from);
  }

  void write_queries(const BackwardTile& tile) const {
    for (int64_t i = 0; i < tile.queries.count; ++i) {
      const int64_t row = tile.queries[i];
      write_row(p_.grad_query, row, p_.head_dim, grad_scale_.sums, tile.grad_query + i * dim_);
      write_row(p_.grad_query_value, row, p_.query_value_dim, 1.0f,
                tile.grad_value + i * query_value_dim_);
    }
  }

  void write_keys(const Positions& keys, int64_t place) {
    const auto row = [&](const MutableView& to, int64_t j, int64_t count, const double* from,
                         double factor, float* buffer) {
      for (int64_t i = 0; i < count; ++i) buffer[i] = float(from[i] * factor);
      write_row(to, j, count, 1.0f, buffer);
    };
    for (int64_t i = 0; i < keys.count; ++i) {
      row(p_.grad_key, keys[i], p_.head_dim, key_sums_ + (place + i) * dim_,
          double(grad_scale_.sums), grad_key_);
      row(p_.grad_value, keys[i], p_.value_dim, value_sums_ + (place + i) * value_dim_, 1.0,
          grad_value_);
    }
  }

  const BidirectionalBackward& p_;
  int64_t dim_, value_dim_, query_value_dim_, rows_size_, count_ = 0, b_ = 0, h_ = 0;
  bool masked_;  // scores are in natural units
  Scaling scaling_;
  GradientScale grad_scale_;
  float unit_;  // of the scores that are kept
  ScoreTileSize size_;
  bool keeps_;  // score tiles between the passes
  Pass pass_ = Pass::kMaxima;
  ScoreTile kept_;
  SideStatistics rows_, keys_;  // by place; visible positions first, then the hidden ones
  float *tile_memory_, *maximum_, *pairs_, *column_pairs_, *factor_, *column_factor_;
  float *key_, *key_columns_, *value_, *grad_, *grad_columns_, *grad_key_, *grad_value_;
  double *key_sums_, *value_sums_;
  int32_t *query_list_, *key_list_;
  VisibleAndHidden queries_, all_keys_;
  BackwardTile tile_[kTilesAtOnce];
};

template <class HalfMath>
void bidirectional_backward(const BidirectionalBackward& given, ParallelFor parallel) {
  if constexpr (!kTakesAll<HalfMath>) {
    if (!narrow_products(given)) return HalfMath::kFloat32->bidirectional_backward(given, parallel);
  }
  BidirectionalBackward p = given;
  if (wants_exchange(given)) {
    p = exchanged(given);
    std::swap(p.grad_out_q, p.grad_out_k);
    std::swap(p.grad_lse_q, p.grad_lse_k);
    std::swap(p.grad_query, p.grad_key);
    std::swap(p.grad_value, p.grad_query_value);
    std::swap(p.grad_mask.row, p.grad_mask.column);
  }
  if (p.batch * p.heads == 0) return;
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(3 * p.head_dim + 2 * p.value_dim + 2 * p.query_value_dim);
  auto* body = head_tasks<BidirectionalBackwardTask<HalfMath>>;
  const auto tasks = gradient_tasks(p);
  ff::run(parallel, tasks.count(), flops, body, tasks);
}

}  // namespace
}  // namespace ff
