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
// softmax and sum_j P dP; it keeps exp(S - m) and dP of a panel for the second, 384 bytes a key:
// to compute them again would take forward and backward of 1,500 keys 1.2 times as long.
//
// A task is a key head: it adds up dK and dV over its query heads and panels in a fixed order, so
// the bits do not depend on threads. Up to four panels at a time walk the keys together and share
// what is made of a block. Where the gradient of a mask is summed over batch entries or heads,
// those are one task.
#pragma once

#include "cpu/softmax/dropout.h"
#include "few_backward.h"
#include "panels.h"
#include "cpu/softmax/outputs.h"
#include "cpu/task.h"

namespace ff {
namespace {

// P c and dS as they are computed, keys down and queries across, become left operands: in place
// for products over the queries, in another array for those over the keys.
template <class Math>
struct Gradients;

template <>
struct Gradients<Float32Math> {
  static void store_pairs(int64_t, int64_t, const float*, float*) {}
  static void round_rows(int64_t, int64_t, float*) {}

  static LeftColumns<Float32Math> by_query(const float* scores, const float*, int64_t columns) {
    return Weights<Float32Math>::by_query(scores, columns);
  }
};

// Sums over panels: one chain of float32 would grow wrong with their number.
inline void add(double* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += double(part[i]);
}

struct BackwardPanel : Panel {
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
    const int64_t fitting = kKept / (2 * Panels::kMost * (p.kv_len + 1));
    most_ = fitting < 1 ? 1 : fitting < kGroup ? fitting : kGroup;
  }

  bool allocate() {
    constexpr int64_t kMost = Panels::kMost;
    return carve(p_, {{&panels_, most_ * panel_floats()},
                      {&maximum_, kMost},
                      {&scores_, most_ * p_.kv_len * kMost},
                      {&grad_scores_, most_ * p_.kv_len * kMost},
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
    const Positions keys = visible_keys(p_, b, p_.kv_len, list_);
    const int64_t members = p_.heads / p_.kv_heads;
    const Panels panels = all_panels(p_);
    const int64_t total = members * panels.count;
    one_group_ = 0 < total && total <= most_;
    for (int64_t i = 0; i < keys.count * dim_ && !one_group_; ++i) key_sums_[i] = 0.0;
    for (int64_t i = 0; i < keys.count * value_dim_ && !one_group_; ++i) value_sums_[i] = 0.0;
    for (int64_t first = 0; first < total; first += count_) {
      count_ = total - first < most_ ? total - first : most_;
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t panel = first + i;
        start(b, group * members + panel / panels.count, panels[panel % panels.count], i);
      }
      walk(b, group, keys);
    }
    if (!one_group_) write_sums(b, group, keys);
    if (keys.count < p_.kv_len) clear_hidden(b, group, keys);
  }

 private:
  static constexpr int64_t kKept = 1 << 18;  // floats that more than one panel may keep: 1 MB

  int64_t panel_floats() const {
    return Panels::kMost * (3 * dim_ + 2 * value_dim_ + 2 * Vec::kLanes + 5);
  }

  void start(int64_t b, int64_t h, const Block& queries, int64_t i) {
    constexpr int64_t kMost = Panels::kMost;
    BackwardPanel& panel = panel_[i];
    float* next = panels_ + i * panel_floats();
    const auto take = [&](int64_t floats) { return (next += floats) - floats; };
    panel.h = h, panel.queries = queries, panel.columns = padded(queries.count);
    panel.query_t = take(kMost * (dim_ + Vec::kLanes));
    panel.grad_t = take(kMost * (value_dim_ + Vec::kLanes));
    panel.query = take(kMost * dim_), panel.grad = take(kMost * value_dim_);
    panel.grad_query = take(kMost * dim_);
    panel.statistics = {take(kMost), take(kMost), take(kMost)};
    panel.weighted = take(kMost), panel.grad_lse = take(kMost);
    const Slice query(p_.query, p_.type, b, h), grad(p_.grad_out, p_.type, b, h);
    query_t_[i] =
        Operands<Math>::lanes(query, queries, p_.head_dim, scaling_.factor, panel.query_t);
    grad_t_[i] = Operands<Math>::lanes(grad, queries, p_.value_dim, 1.0f, panel.grad_t);
    query_[i] = Operands<Math>::columns(query, queries, p_.head_dim, panel.query);
    grad_[i] = Operands<Math>::columns(grad, queries, p_.value_dim, panel.grad);
    for (int64_t e = 0; e < panel.columns; ++e) panel.weighted[e] = 0.0f;
    panel.statistics.clear(panel.columns);
  }

  // All blocks for the panels at hand, for the statistics and then for the gradients; a block that
  // is the only one stays in the first cache in between, panel by panel.
  void walk(int64_t b, int64_t group, const Positions& keys) {
    const Slice key(p_.key, p_.type, b, group), value(p_.value, p_.type, b, group);
    for (int64_t i = 0; i < count_; ++i) {
      BackwardPanel& panel = panel_[i];
      const int64_t last = panel.queries.first + panel.queries.count - 1;
      panel.visible = keys.before(p_.keys_seen_by(last));
    }
    const bool one_block = keys.count <= kBlock;
    for (int pass = 0; pass < 2 - one_block; ++pass) {
      const bool first = pass == 0, last = pass == 1 || one_block;
      for (int64_t done = 0; done < keys.count; done += kBlock) {
        const Block block = block_at(keys, done);
        LeftRows<Math> key_rows{}, value_rows{};
        Right<Math> key_columns{};
        if (first) {
          key_rows = Operands<Math>::rows(key, block, p_.head_dim, key_);
          value_rows = Operands<Math>::rows(value, block, p_.value_dim, value_);
        }
        if (last) {
          key_columns = Operands<Math>::columns(key, block, p_.head_dim, key_columns_);
          // The first panel stores what it sees, and the others add to it.
          const int64_t seen_first = seen(panel_[0], block).count;
          const int64_t from = seen_first > 0 ? seen_first : 0;
          for (int64_t e = from * dim_; e < block.count * dim_; ++e) grad_key_[e] = 0.0f;
          for (int64_t e = from * value_dim_; e < block.count * value_dim_; ++e)
            grad_value_[e] = 0.0f;
        }
        for (int64_t i = 0; i < count_; ++i) {
          const Block some = seen(panel_[i], block);
          const Kept at = kept(one_block ? 0 : i, panel_[i], block);
          if (first && some.count > 0) products(b, i, some, at, key_rows, value_rows);
          if (one_block) finish_statistics(b, panel_[i]);
          if (last && some.count > 0) gradients(b, i, some, at, key_columns);
        }
        if (last && one_group_) {
          const auto same = [](int64_t) { return 1.0f; };
          const auto scale = [this](int64_t) { return grad_scale_.sums; };
          store_rows(p_.grad_key, p_.type, b, group, block, p_.head_dim, scale, grad_key_);
          store_rows(p_.grad_value, p_.type, b, group, block, p_.value_dim, same, grad_value_);
        } else if (last) {
          add(key_sums_ + done * dim_, grad_key_, block.count * dim_);
          add(value_sums_ + done * value_dim_, grad_value_, block.count * value_dim_);
        }
      }
      for (int64_t i = 0; i < count_ && !last; ++i) finish_statistics(b, panel_[i]);
    }
    for (int64_t i = 0; i < count_; ++i) {
      const BackwardPanel& panel = panel_[i];
      for (int64_t e = 0; e < panel.queries.count * dim_ && panel.visible == 0; ++e)
        panel.grad_query[e] = 0.0f;
      const auto scale = [this](int64_t) { return grad_scale_.sums; };
      store_rows(p_.grad_query, p_.type, b, panel.h, panel.queries, p_.head_dim, scale,
                 panel.grad_query);
    }
  }

  // What a panel keeps of a block.
  struct Kept {
    float *scores, *grad_scores, *maxima;
  };

  Kept kept(int64_t i, const Panel& panel, const Block& block) const {
    const int64_t at = i * p_.kv_len * Panels::kMost + block.first * panel.columns;
    return {scores_ + at, grad_scores_ + at,
            maxima_ + (i * blocks_ + block.first / kBlock) * Panels::kMost};
  }

  // exp(S - m) and dP of a block, the latter with its dropout factors, and the statistics so far:
  // m, l and sum_j exp(S - m) dP.
  void products(int64_t b, int64_t i, const Block& block, const Kept& to, const LeftRows<Math>& key,
                const LeftRows<Math>& value) {
    const BackwardPanel& panel = panel_[i];
    const int64_t columns = panel.columns;
    for (int64_t e = 0; e < columns; ++e) maximum_[e] = -kInfinity;
    multiply_dims(key, query_t_[i], block.count, columns, Operands<Math>::steps(p_.head_dim),
                  to.scores, StoreMaximum{to.scores, columns, maximum_});
    multiply_dims(value, grad_t_[i], block.count, columns, Operands<Math>::steps(p_.value_dim),
                  to.grad_scores, Store{to.grad_scores, columns});
    const Scores scores{p_, b, panel.h, panel.queries, columns, to.scores};
    if (p_.dropout) {
      dropout_factors(scores, block, kRowStream, factor_);
      for (int64_t e = 0; e < block.count * columns; e += Vec::kLanes)
        (Vec::load(to.grad_scores + e) * Vec::load(factor_ + e)).store(to.grad_scores + e);
    }
    float unit = scaling_.unit;
    if (p_.mask.data || crosses_diagonal(scores, block)) {
      mask_scores(scores, block, unit, maximum_);
      unit = 1.0f;
    }
    online_softmax<Float32Math, Base::kE>(block, columns, unit, maximum_, nullptr, to.scores,
                                          panel.statistics);
    for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
      Vec::load(panel.statistics.maximum + lane).store(to.maxima + lane);
      FourSums sum;
      for (int64_t j = 0; j < block.count; ++j)
        sum.part[j % 4] = Vec::fma(Vec::load(to.scores + j * columns + lane),
                                   Vec::load(to.grad_scores + j * columns + lane), sum.part[j % 4]);
      Vec::fma(Vec::load(panel.weighted + lane), Vec::load(panel.statistics.rescale + lane),
               sum.total())
          .store(panel.weighted + lane);
    }
  }

  // From sums to what the gradients multiply and subtract: 1 / l in `sum`, delta in `weighted`.
  void finish_statistics(int64_t b, const BackwardPanel& panel) {
    for (int64_t i = 0; i < panel.columns; ++i) {
      float& sum = panel.statistics.sum[i];
      const bool dead = sum == 0.0f || i >= panel.queries.count;  // then P = 0
      panel.weighted[i] = dead ? 0.0f : panel.weighted[i] / sum;
      panel.grad_lse[i] = dead ? 0.0f : p_.grad_lse.at(b, panel.h, panel.queries[i]);
      sum = dead ? 0.0f : inverse(sum);
    }
  }

  // P c in the place of exp(S - m), dS in that of dP, and what they add to the gradients.
  void gradients(int64_t b, int64_t i, const Block& block, const Kept& at, const Right<Math>& key) {
    const BackwardPanel& panel = panel_[i];
    const int64_t columns = panel.columns;
    if (p_.dropout) {
      dropout_factors({p_, b, panel.h, panel.queries, columns, at.scores}, block, kRowStream,
                      factor_);
    }
    for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
      const Vec offset = finite(Vec::load(panel.statistics.maximum + lane));
      const Vec since = exponential(Vec::load(at.maxima + lane), 1.0f, offset);
      const Vec factor = since * Vec::load(panel.statistics.sum + lane);
      const Vec delta = Vec::load(panel.weighted + lane);
      const Vec grad_lse = Vec::load(panel.grad_lse + lane);
      for (int64_t j = 0; j < block.count; ++j) {
        const int64_t e = j * columns + lane;
        const Vec weight = Vec::load(at.scores + e) * factor;
        const Vec grad = (Vec::load(at.grad_scores + e) - delta) + grad_lse;
        (weight * grad).store(at.grad_scores + e);
        (p_.dropout ? weight * Vec::load(factor_ + e) : weight).store(at.scores + e);
      }
    }
    for (int64_t row = 0; row < panel.queries.count; ++row)
      add_mask_gradient(p_.grad_mask, b, panel.h, panel.queries[row], block, at.grad_scores + row,
                        columns);
    grad_scale_.apply(block.count * columns, at.grad_scores);

    Gradients<Math>::store_pairs(block.count, columns, at.grad_scores, pairs_);
    Gradients<Math>::round_rows(block.count, columns, at.scores);
    Gradients<Math>::round_rows(block.count, columns, at.grad_scores);
    const int64_t steps = Operands<Math>::steps(panel.queries.count);
    multiply(Weights<Math>::by_key(at.scores, columns), grad_[i], block.count, value_dim_, steps,
             Add{grad_value_, value_dim_, i == 0});
    const auto by_key = Weights<Math>::by_key(at.grad_scores, columns);
    multiply(by_key, query_[i], block.count, dim_, steps, Add{grad_key_, dim_, i == 0});
    multiply(Gradients<Math>::by_query(at.grad_scores, pairs_, columns), key, panel.queries.count,
             dim_, Operands<Math>::steps(block.count),
             Add{panel.grad_query, dim_, block.first == 0});
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
  int64_t blocks_, most_;   // blocks of keys, panels at a time
  bool one_group_ = false;  // of panels: the gradients of a block are then complete
  float *panels_, *maximum_, *scores_, *grad_scores_, *maxima_, *pairs_, *factor_;
  float *key_, *key_columns_, *value_, *grad_key_, *grad_value_;  // of a block
  double *key_sums_, *value_sums_;
  int32_t* list_;
  BackwardPanel panel_[kGroup];
  Right<Math> query_t_[kGroup], grad_t_[kGroup], query_[kGroup], grad_[kGroup];
};

template <class HalfMath>
void attention_backward_part(const AttentionBackward& p, int64_t begin, int64_t end) {
  auto* body = narrow_products(p) ? head_tasks<BackwardTask<HalfMath>>
                                  : head_tasks<BackwardTask<Float32Math>>;
  if (few_rows(p)) {
    body =
        with_type(p.type, [](auto kind) { return &head_tasks<FewBackwardTask<decltype(kind)>>; });
  }
  const auto tasks = gradient_tasks(p);
  body(begin, end, &tasks);
}

template <class HalfMath>
void attention_backward(const AttentionBackward& p, ParallelFor parallel) {
  if (p.batch * p.kv_heads == 0) return;
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(3 * p.head_dim + 2 * p.value_dim);
  const auto body = [](int64_t begin, int64_t end, const void* context) {
    attention_backward_part<HalfMath>(*static_cast<const AttentionBackward*>(context), begin, end);
  };
  ff::run(parallel, gradient_tasks(p).count(), flops, body, p);
}

}  // namespace
}  // namespace ff
