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
// softmax and sum_j P dP; with one block of keys (up to 256) it is the only one.
//
// A task is a key head: it adds up dK and dV over its query heads and panels in a fixed order, so
// the bits do not depend on threads. Where the gradient of a mask is summed over heads or batch
// entries, all that share an entry are one task.
#pragma once

#include "dropout.h"
#include "tile.h"

namespace ff {
namespace {

struct BackwardScratch {
  float *query_t, *grad_t, *query, *grad, *scores, *grad_scores, *factor, *key, *value;
  float *grad_query, *part, *weighted, *grad_lse;
  // One float32 chain over all panels and query heads would grow wrong with their number.
  double *grad_key, *grad_value;
  Statistics statistics;
  int32_t* list;

  bool allocate(const Attention& p) {
    const int64_t columns = padded(kPanel);
    const int64_t dim = padded(p.head_dim), value_dim = padded(p.value_dim);
    float *key_sums, *value_sums;
    const bool enough = carve(p,
                              {{&query_t, p.head_dim * columns},
                               {&grad_t, p.value_dim * columns},
                               {&query, kPanel * dim},
                               {&grad, kPanel * value_dim},
                               {&scores, kBlock * columns},
                               {&grad_scores, kBlock * columns},
                               {&factor, p.dropout ? kBlock * columns : 0},
                               {&key, kBlock * dim},
                               {&value, kBlock * p.value_dim},
                               {&grad_query, kPanel * dim},
                               {&key_sums, 2 * p.kv_len * dim},
                               {&value_sums, 2 * p.kv_len * value_dim},
                               {&part, kBlock * (dim > value_dim ? dim : value_dim)},
                               {&weighted, columns},
                               {&grad_lse, columns},
                               {&statistics.maximum, columns},
                               {&statistics.sum, columns},
                               {&statistics.rescale, columns}},
                              &list);
    grad_key = reinterpret_cast<double*>(key_sums);
    grad_value = reinterpret_cast<double*>(value_sums);
    return enough;
  }
};

inline void add(double* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += double(part[i]);
}

struct Panel {
  int64_t b, h, first, queries, columns;
  Rows query, grad;  // padded rows, the second operand of dK and dV
};

// S and dP of one block of keys, the latter with its dropout factors. Returns the keys' rows.
inline Rows block_products(const AttentionBackward& p, const Panel& at, const Keys& keys,
                           int64_t block, int64_t count, const BackwardScratch& s) {
  const int64_t group = at.h / (p.heads / p.kv_heads), columns = at.columns;
  const Rows key = rows(p.key, p.type, at.b * p.key.batch + group * p.key.head, keys, block, count,
                        p.head_dim, padded(p.head_dim), s.key);
  const Rows value = rows(p.value, p.type, at.b * p.value.batch + group * p.value.head, keys, block,
                          count, p.value_dim, p.value_dim, s.value);
  multiply(key.data, key.stride, 1, s.query_t, columns, count, columns, p.head_dim, s.scores,
           columns, false);
  multiply(value.data, value.stride, 1, s.grad_t, columns, count, columns, p.value_dim,
           s.grad_scores, columns, false);
  mask_scores(p, at.b, at.h, at.first, at.queries, keys, block, count, columns, s.scores);
  if (p.dropout) {
    dropout_factors(p, at.b, at.h, at.first, keys, block, count, columns, s.factor);
    for (int64_t j = 0; j < count * columns; j += Vec::kLanes)
      (Vec::load(s.grad_scores + j) * Vec::load(s.factor + j)).store(s.grad_scores + j);
  }
  return key;
}

// weighted[i] = sum_j exp(S - m) dP over the blocks so far; the scores become exp(S - m).
inline void gather_statistics(int64_t count, int64_t columns, const BackwardScratch& s) {
  online_softmax(count, columns, s.scores, s.statistics);
  for (int64_t i = 0; i < columns; i += Vec::kLanes) {
    FourSums sum;
    for (int64_t j = 0; j < count; ++j)
      sum.part[j % 4] = Vec::fma(Vec::load(s.scores + j * columns + i),
                                 Vec::load(s.grad_scores + j * columns + i), sum.part[j % 4]);
    Vec::fma(Vec::load(s.weighted + i), Vec::load(s.statistics.rescale + i), sum.total())
        .store(s.weighted + i);
  }
}

// From sums to what the gradients divide by and subtract: l in `sum`, delta in `weighted`.
inline void finish_statistics(const AttentionBackward& p, const Panel& at,
                              const BackwardScratch& s) {
  for (int64_t i = 0; i < at.columns; ++i) {
    const float sum = s.statistics.sum[i];
    const bool dead = sum == 0.0f || i >= at.queries;  // then P = 0
    s.weighted[i] = dead ? 0.0f : s.weighted[i] / sum;
    s.grad_lse[i] = 0.0f;
    if (p.grad_lse && !dead) {
      s.grad_lse[i] = p.grad_lse[at.b * p.grad_lse_batch + at.h * p.grad_lse_head +
                                 (at.first + i) * p.grad_lse_row];
    }
    if (dead) s.statistics.sum[i] = kInfinity;
  }
}

// P c in the place of the scores and dS in that of dP.
inline void block_gradients(const AttentionBackward& p, const Panel& at, const Keys& keys,
                            int64_t block, int64_t count, bool exponentials,
                            const BackwardScratch& s) {
  const int64_t columns = at.columns;
  for (int64_t i = 0; i < columns; i += Vec::kLanes) {
    const Vec sum = Vec::load(s.statistics.sum + i), delta = Vec::load(s.weighted + i);
    const Vec grad_lse = Vec::load(s.grad_lse + i);
    const Vec offset = finite(s.statistics.maximum + i);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t e = j * columns + i;
      Vec weight = Vec::load(s.scores + e);
      weight = (exponentials ? weight : exp(weight - offset)) / sum;
      const Vec grad = (Vec::load(s.grad_scores + e) - delta) + grad_lse;
      (weight * grad).store(s.grad_scores + e);
      (p.dropout ? weight * Vec::load(s.factor + e) : weight).store(s.scores + e);
    }
  }
  const int64_t offset =
      at.b * p.grad_mask_batch + at.h * p.grad_mask_head + at.first * p.grad_mask_row;
  for (int64_t j = 0; j < count && (p.grad_mask || p.grad_mask_sums); ++j) {
    const int64_t column = offset + keys[block + j] * p.grad_mask_column;
    const float* grad = s.grad_scores + j * columns;
    for (int64_t i = 0; i < at.queries; ++i) {
      if (p.grad_mask) {
        p.grad_mask[column + i * p.grad_mask_row] = grad[i];
      } else {
        p.grad_mask_sums[column + i * p.grad_mask_row] += double(grad[i]);
      }
    }
  }
}

inline void backward_panel(const AttentionBackward& p, int64_t b, int64_t h, int64_t first,
                           Keys keys, const BackwardScratch& s) {
  const int64_t queries = p.q_len - first < kPanel ? p.q_len - first : kPanel;
  const int64_t columns = padded(queries);
  const int64_t dim = padded(p.head_dim), value_dim = padded(p.value_dim);
  const int64_t query_offset = b * p.query.batch + h * p.query.head;
  const int64_t grad_offset = b * p.grad_out.batch + h * p.grad_out.head;
  const Keys every{p.q_len, nullptr};
  transpose(p.query, p.type, query_offset, first, queries, p.head_dim, columns, s.query_t);
  transpose(p.grad_out, p.type, grad_offset, first, queries, p.value_dim, columns, s.grad_t);
  const Panel at{
      b,
      h,
      first,
      queries,
      columns,
      rows(p.query, p.type, query_offset, every, first, queries, p.head_dim, dim, s.query),
      rows(p.grad_out, p.type, grad_offset, every, first, queries, p.value_dim, value_dim, s.grad)};
  for (int64_t i = 0; i < queries * dim; ++i) s.grad_query[i] = 0.0f;
  for (int64_t i = 0; i < columns; ++i) s.weighted[i] = 0.0f;
  s.statistics.clear(columns);

  while (p.causal && keys.count > 0 && keys[keys.count - 1] >= first + queries)
    keys.count = keys.list ? keys.count - 1 : first + queries;
  const bool one_block = keys.count <= kBlock;
  for (int64_t block = 0; block < keys.count && !one_block; block += kBlock) {
    const int64_t count = keys.count - block < kBlock ? keys.count - block : kBlock;
    block_products(p, at, keys, block, count, s);
    gather_statistics(count, columns, s);
  }
  if (!one_block) finish_statistics(p, at, s);
  for (int64_t block = 0; block < keys.count; block += kBlock) {
    const int64_t count = keys.count - block < kBlock ? keys.count - block : kBlock;
    const Rows key = block_products(p, at, keys, block, count, s);
    if (one_block) {
      gather_statistics(count, columns, s);
      finish_statistics(p, at, s);
    }
    block_gradients(p, at, keys, block, count, one_block, s);
    multiply(s.scores, columns, 1, at.grad.data, at.grad.stride, count, value_dim, queries, s.part,
             value_dim, false);
    add(s.grad_value + block * value_dim, s.part, count * value_dim);
    multiply(s.grad_scores, columns, 1, at.query.data, at.query.stride, count, dim, queries, s.part,
             dim, false);
    add(s.grad_key + block * dim, s.part, count * dim);
    multiply(s.grad_scores, 1, columns, key.data, key.stride, queries, dim, count, s.grad_query,
             dim, true);
  }
  for (int64_t i = 0; i < queries; ++i) {
    const MutableView& to = p.grad_query;
    scale_row(s.grad_query + i * dim, dim, p.scale);
    store(to.data, p.type, b * to.batch + h * to.head + (first + i) * to.row, to.column, p.head_dim,
          s.grad_query + i * dim);
  }
}

inline void backward_key_head(const AttentionBackward& p, int64_t b, int64_t group,
                              const BackwardScratch& s) {
  const int64_t dim = padded(p.head_dim), value_dim = padded(p.value_dim);
  const Keys keys = visible_keys(p, b, p.kv_len, s.list);
  for (int64_t i = 0; i < p.kv_len * dim; ++i) s.grad_key[i] = 0.0;
  for (int64_t i = 0; i < p.kv_len * value_dim; ++i) s.grad_value[i] = 0.0;
  const int64_t members = p.heads / p.kv_heads;
  for (int64_t h = group * members; h < (group + 1) * members; ++h)
    for (int64_t first = 0; first < p.q_len; first += kPanel)
      backward_panel(p, b, h, first, keys, s);

  const auto write = [&](const MutableView& to, int64_t j, int64_t count, const double* from,
                         double factor) {
    for (int64_t i = 0; i < count; ++i) s.part[i] = float(from[i] * factor);
    store(to.data, p.type, b * to.batch + group * to.head + j * to.row, to.column, count, s.part);
  };
  // Rows past keys.count are still 0: what hidden keys get.
  int64_t next = 0, hidden = keys.count;
  for (int64_t j = 0; j < p.kv_len; ++j) {
    const bool visible = next < keys.count && keys[next] == j;
    const int64_t from = visible ? next++ : hidden++;
    write(p.grad_key, j, p.head_dim, s.grad_key + from * dim, double(p.scale));
    write(p.grad_value, j, p.value_dim, s.grad_value + from * value_dim, 1.0);
  }
}

struct BackwardTasks {
  const AttentionBackward* p;
  int64_t key_heads;  // of a task
};

inline void backward_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& tasks = *static_cast<const BackwardTasks*>(context);
  const AttentionBackward& p = *tasks.p;
  BackwardScratch s;
  if (!s.allocate(p)) return;
  for (int64_t i = begin * tasks.key_heads; i < end * tasks.key_heads; ++i)
    backward_key_head(p, i / p.kv_heads, i % p.kv_heads, s);
}

inline void attention_backward(const AttentionBackward& p, ParallelFor parallel) {
  const int64_t slices = p.batch * p.kv_heads;
  if (slices == 0) return;
  int64_t key_heads = 1;
  if (p.grad_mask_sums && p.grad_mask_batch == 0) {
    key_heads = slices;
  } else if (p.grad_mask_sums && p.grad_mask_head == 0) {
    key_heads = p.kv_heads;
  }
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(3 * p.head_dim + 2 * p.value_dim);
  run(parallel, slices / key_heads, flops, backward_tasks, BackwardTasks{&p, key_heads});
}

}  // namespace
}  // namespace ff
