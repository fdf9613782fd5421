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
// Three passes over the tiles of a head: the maxima of rows and columns, their sums, the gradients.
// An online softmax would save the first and rescale every sum of the keys once per panel, which
// makes dV twice as wrong as the plain formula. The tiles of a short head, S, dP and dR, are kept
// in between; those of a long one are computed again.
#pragma once

#include "cpu/attention/backward.h"
#include "statistics.h"

namespace ff {
namespace {

// S and dP or dR of a block of keys, down, against a panel of queries, across.
struct Tile {
  float *scores, *grad_rows, *grad_columns;
};

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
        masked_(has_few(p) || p.mask.data || p.causal),
        scaling_(scaling_of<Math>(p.scale, Base::kE)),
        grad_scale_(p.scale),
        unit_(masked_ ? 1.0f : scaling_.unit),
        size_(p.kv_len),
        keeps_(3 * p.kv_len * rows_size_ <= kKept) {}

  bool allocate() {
    const int64_t tiles = keeps_ ? rows_size_ * p_.kv_len : size_.floats();
    const int64_t pairs = Math::kDepth > 1 ? (size_.keys + 1) / 2 * size_.queries : 0;
    const int64_t factors = p_.dropout ? size_.floats() : 0;
    return carve(p_, {{&panel_memory_, kPanels * panel_floats()},
                      {&maximum_, size_.queries},
                      {&tiles_.scores, tiles},
                      {&tiles_.grad_rows, tiles},
                      {&tiles_.grad_columns, tiles},
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
    queries_ = split(p_.query_padding, b * p_.query_padding_batch, p_.query_padding_column,
                     p_.q_len, query_list_);
    all_keys_ = split(p_.padding, b * p_.padding_batch, p_.padding_column, p_.kv_len, key_list_);
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
  static constexpr int64_t kKept = 1 << 19;  // floats of tiles that a head may keep: 2 MB

  enum class Pass { kMaxima, kSums, kGradients };

  struct BackwardPanel {
    Block queries;
    int64_t columns, place;  // of its first query among all, in whole registers
    SideStatistics rows;
    Right<Math> query_t, grad_t, value_t, query, grad;
    float *grad_query, *grad_value;
  };

  // The keys of a tile: whether they and the queries are visible says whom the tile serves.
  struct TileKeys {
    Block block;
    int64_t place;  // of the first key among all
    bool for_queries, for_keys;
    LeftRows<Math> key{}, value{}, grad{};  // of K, V and dO_k, as far as the pass wants them
    Right<Math> key_columns{}, grad_columns{};
  };

  bool multiplies() const { return pass_ == Pass::kMaxima || !keeps_; }
  bool multiplies_gradients() const { return (pass_ == Pass::kMaxima) == keeps_; }

  int64_t panel_floats() const {
    const int64_t turned = 3 * Vec::kLanes;  // what odd dims may add
    return size_.queries * (3 * dim_ + 2 * value_dim_ + 2 * query_value_dim_ + turned);
  }

  // All tiles, for up to kPanels panels at a time, of visible queries or of hidden ones.
  void pass(Pass which) {
    pass_ = which;
    int64_t place = 0;
    for (const bool visible : {true, false}) {
      const Panels panels(visible ? queries_.visible : queries_.hidden, size_.queries);
      for (int64_t first = 0; first < panels.count; first += count_) {
        count_ = panels.count - first < kPanels ? panels.count - first : kPanels;
        for (int64_t i = 0; i < count_; ++i) place = start(panels[first + i], place, i);
        const Positions &seen = all_keys_.visible, &hidden = all_keys_.hidden;
        for (int64_t done = 0; done < seen.count; done += size_.keys)
          serve({block_at(seen, done, size_.keys), done, true, visible});
        for (int64_t done = 0; done < hidden.count && visible; done += size_.keys)
          serve({block_at(hidden, done, size_.keys), seen.count + done, false, true});
        for (int64_t i = 0; i < count_; ++i) finish(panel_[i]);
      }
    }
  }

  Slice slice(const View& view) const { return Slice(view, p_.type, b_, h_); }

  // Prepares what the pass wants of a panel; returns the place of the next.
  int64_t start(const Block& queries, int64_t place, int64_t i) {
    float* next = panel_memory_ + i * panel_floats();
    const auto take = [&](int64_t floats) {
      return (next += floats * size_.queries) - floats * size_.queries;
    };
    const auto turned = [&](const View& view, int64_t dim, float factor) {
      return Operands<Math>::lanes(slice(view), queries, dim, factor,
                                   take(padded(dim) + Vec::kLanes));
    };
    const auto columns = [&](const View& view, int64_t dim) {
      return Operands<Math>::columns(slice(view), queries, dim, take(padded(dim)));
    };
    BackwardPanel& panel = panel_[i];
    panel.queries = queries, panel.columns = padded(queries.count), panel.place = place;
    panel.rows = rows_.at(place);
    if (multiplies()) panel.query_t = turned(p_.query, p_.head_dim, scaling_.factor);
    if (multiplies_gradients()) {
      panel.grad_t = turned(p_.grad_out_q, p_.value_dim, 1.0f);
      panel.value_t = turned(p_.query_value, p_.query_value_dim, 1.0f);
    }
    if (pass_ == Pass::kGradients) {
      panel.query = columns(p_.query, p_.head_dim);
      panel.grad = columns(p_.grad_out_q, p_.value_dim);
      panel.grad_query = take(dim_), panel.grad_value = take(query_value_dim_);
      for (int64_t e = 0; e < queries.count * dim_; ++e) panel.grad_query[e] = 0.0f;
      for (int64_t e = 0; e < queries.count * query_value_dim_; ++e) panel.grad_value[e] = 0.0f;
    }
    return place + panel.columns;
  }

  void finish(const BackwardPanel& panel) {
    if (pass_ == Pass::kSums) panel.rows.finish(panel.queries, p_.grad_lse_q, b_, h_);
    if (pass_ == Pass::kGradients) write_queries(panel);
  }

  // The panels at hand against the keys of a block.
  void serve(TileKeys keys) {
    const Block& block = keys.block;
    if (multiplies()) keys.key = Operands<Math>::rows(slice(p_.key), block, p_.head_dim, key_);
    if (multiplies_gradients() && keys.for_queries) {
      keys.value = Operands<Math>::rows(slice(p_.value), block, p_.value_dim, value_);
    }
    if (multiplies_gradients() && keys.for_keys) {
      keys.grad = Operands<Math>::rows(slice(p_.grad_out_k), block, p_.query_value_dim, grad_);
    }
    if (pass_ == Pass::kGradients) {
      keys.key_columns = Operands<Math>::columns(slice(p_.key), block, p_.head_dim, key_columns_);
      if (keys.for_keys) {
        keys.grad_columns =
            Operands<Math>::columns(slice(p_.grad_out_k), block, p_.query_value_dim, grad_columns_);
      }
      for (int64_t e = 0; e < block.count * dim_; ++e) grad_key_[e] = 0.0f;
      for (int64_t e = 0; e < block.count * value_dim_; ++e) grad_value_[e] = 0.0f;
    }
    for (int64_t i = 0; i < count_; ++i) {
      const BackwardPanel& panel = panel_[i];
      const int64_t at = keeps_ ? panel.place * p_.kv_len + keys.place * panel.columns : 0;
      const Tile tile{tiles_.scores + at, tiles_.grad_rows + at, tiles_.grad_columns + at};
      const Scores scores{p_, b_, h_, panel.queries, panel.columns, tile.scores};
      if (multiplies()) products(scores, panel, keys, tile);
      const SideStatistics rows = panel.rows, columns = keys_.at(keys.place);
      if (pass_ == Pass::kMaxima) {
        add_maxima(scores, block, unit_, maximum_, keys.for_queries ? &rows : nullptr,
                   keys.for_keys ? &columns : nullptr);
      } else if (pass_ == Pass::kSums) {
        if (keys.for_queries) add_row_sums(scores, block, unit_, tile.grad_rows, rows);
        if (keys.for_keys) add_column_sums(scores, block, unit_, tile.grad_columns, columns);
      } else {
        score_gradients(scores, panel, keys, tile);
        add_gradients(panel, keys, tile);
      }
    }
    if (pass_ == Pass::kGradients) {
      add(key_sums_ + keys.place * dim_, grad_key_, block.count * dim_);
      add(value_sums_ + keys.place * value_dim_, grad_value_, block.count * value_dim_);
    }
  }

  // S with the mask, and what of dP and dR the tile serves, with their dropout factors.
  void products(const Scores& scores, const BackwardPanel& panel, const TileKeys& keys,
                const Tile& tile) {
    const Block& block = keys.block;
    const int64_t columns = panel.columns;
    for (int64_t e = 0; e < columns; ++e) maximum_[e] = -kInfinity;
    const int64_t steps = Operands<Math>::steps(p_.head_dim);
    const bool few = has_few(p_);
    if (few) {
      multiply_in_parts(keys.key, panel.query_t, block.count, columns, steps, tile.scores);
    } else {
      multiply_dims(keys.key, panel.query_t, block.count, columns, steps, tile.scores,
                    StoreMaximum{tile.scores, columns, maximum_});
    }
    if (masked_) mask_scores(scores, block, scaling_.unit, maximum_);
    const auto gradients = [&](const LeftRows<Math>& left, const Right<Math>& right, int64_t dim,
                               uint32_t stream, float* to) {
      const int64_t steps = Operands<Math>::steps(dim);
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
      gradients(keys.value, panel.grad_t, p_.value_dim, kRowStream, tile.grad_rows);
    if (keys.for_keys)
      gradients(keys.grad, panel.value_t, p_.query_value_dim, kColumnStream, tile.grad_columns);
  }

  // P c in the place of dP, R d in that of dR, dS in that of S.
  void score_gradients(const Scores& scores, const BackwardPanel& panel, const TileKeys& tile_keys,
                       const Tile& tile) {
    const SideStatistics queries = panel.rows, keys = keys_.at(tile_keys.place);
    const bool for_queries = tile_keys.for_queries, for_keys = tile_keys.for_keys;
    const Block& block = tile_keys.block;
    if (p_.dropout && for_queries) dropout_factors(scores, block, kRowStream, factor_);
    if (p_.dropout && for_keys) dropout_factors(scores, block, kColumnStream, column_factor_);
    for (int64_t lane = 0; lane < panel.columns; lane += Vec::kLanes) {
      const Vec used = lanes_in_use(panel.queries, lane);
      const Vec maximum = finite(Vec::load(queries.maximum + lane));
      const Vec divisor = Vec::load(queries.sum + lane);
      const Vec delta = Vec::load(queries.weighted + lane);
      const Vec grad_lse = Vec::load(queries.grad_lse + lane);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t e = j * panel.columns + lane;
        const Vec score = Vec::load(tile.scores + e);
        Vec total = Vec::zero();
        if (for_queries) {
          const Vec weight = Vec::select(used, exponential(score, unit_, maximum) * divisor, total);
          total = weight * ((Vec::load(tile.grad_rows + e) - delta) + grad_lse);
          (p_.dropout ? weight * Vec::load(factor_ + e) : weight).store(tile.grad_rows + e);
        }
        if (for_keys) {
          const Vec offset = finite(Vec::set(keys.maximum[j]));
          const Vec every = exponential(score, unit_, offset) * Vec::set(keys.sum[j]);
          const Vec weight = Vec::select(used, every, Vec::zero());
          const Vec grad = (Vec::load(tile.grad_columns + e) - Vec::set(keys.weighted[j])) +
                           Vec::set(keys.grad_lse[j]);
          total = Vec::fma(weight, grad, total);
          (p_.dropout ? weight * Vec::load(column_factor_ + e) : weight)
              .store(tile.grad_columns + e);
        }
        total.store(tile.scores + e);
      }
    }
    for (int64_t row = 0; row < panel.queries.count; ++row)
      add_mask_gradient(p_.grad_mask, b_, h_, panel.queries[row], block, tile.scores + row,
                        panel.columns);
    grad_scale_.apply(block.count * panel.columns, tile.scores);
  }

  void add_gradients(const BackwardPanel& panel, const TileKeys& keys, const Tile& tile) {
    using Grads = Gradients<Math>;
    const int64_t count = keys.block.count;
    const int64_t columns = panel.columns, queries = panel.queries.count;
    const int64_t steps = Operands<Math>::steps(queries);
    const int64_t key_steps = Operands<Math>::steps(count);
    Grads::store_pairs(count, columns, tile.scores, pairs_);
    Grads::round_rows(count, columns, tile.scores);
    multiply(Weights<Math>::by_key(tile.scores, columns), panel.query, count, dim_, steps,
             Add{grad_key_, dim_});
    multiply(Grads::by_query(tile.scores, pairs_, columns), keys.key_columns, queries, dim_,
             key_steps, Add{panel.grad_query, dim_});
    if (keys.for_queries) {
      Grads::round_rows(count, columns, tile.grad_rows);
      multiply(Weights<Math>::by_key(tile.grad_rows, columns), panel.grad, count, value_dim_, steps,
               Add{grad_value_, value_dim_});
    }
    if (keys.for_keys) {
      Grads::store_pairs(count, columns, tile.grad_columns, column_pairs_);
      multiply(Grads::by_query(tile.grad_columns, column_pairs_, columns), keys.grad_columns,
               queries, query_value_dim_, key_steps, Add{panel.grad_value, query_value_dim_});
    }
  }

  void write_row(const MutableView& to, int64_t i, int64_t count, float factor,
                 const float* from) const {
    store(to.data, p_.type, b_ * to.batch + h_ * to.head + i * to.row, to.column, count, factor,
          from);
  }

  void write_queries(const BackwardPanel& panel) const {
    for (int64_t i = 0; i < panel.queries.count; ++i) {
      const int64_t row = panel.queries[i];
      write_row(p_.grad_query, row, p_.head_dim, grad_scale_.sums, panel.grad_query + i * dim_);
      write_row(p_.grad_query_value, row, p_.query_value_dim, 1.0f,
                panel.grad_value + i * query_value_dim_);
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
  TileSize size_;
  bool keeps_;  // tiles between the passes
  Pass pass_ = Pass::kMaxima;
  Tile tiles_;
  SideStatistics rows_, keys_;  // by place; visible positions first, then the hidden ones
  float *panel_memory_, *maximum_, *pairs_, *column_pairs_, *factor_, *column_factor_;
  float *key_, *key_columns_, *value_, *grad_, *grad_columns_, *grad_key_, *grad_value_;
  double *key_sums_, *value_sums_;
  int32_t *query_list_, *key_list_;
  Split queries_, all_keys_;
  BackwardPanel panel_[kPanels];
};

template <class HalfMath>
void bidirectional_backward(const BidirectionalBackward& given, ParallelFor parallel) {
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
  auto* body = narrow_products(p) ? head_tasks<BidirectionalBackwardTask<HalfMath>>
                                  : head_tasks<BidirectionalBackwardTask<Float32Math>>;
  const auto tasks = gradient_tasks(p);
  ff::run(parallel, tasks.count(), flops, body, tasks);
}

}  // namespace
}  // namespace ff
