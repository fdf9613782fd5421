// Attention backward: the scores are computed again from Q, K and lse, block by block, so that no
// Lq x Lk tensor exists (Dao et al., "FlashAttention", 2022, algorithm 4). With P = exp(S - lse):
//
//     dV = (P c)^T dO     dS = P * (c * (dO V^T) - delta)     delta = rowsum(dO * O) - d lse
//     dQ = scale * dS K   dK = scale * dS^T Q                  d bias = dS
//
// A task is a key head: it adds up dK and dV over its query heads and panels in a fixed order, so
// the bits do not depend on threads. Where the gradient of a mask is summed over heads or batch
// entries, all that share an entry are one task.
#pragma once

#include "tile.h"

namespace ff {
namespace {

struct BackwardScratch {
  float *query_t, *grad_t, *query, *grad, *scores, *grad_scores, *factor, *key, *value;
  float *grad_query, *grad_key, *grad_value, *row, *lse, *delta;
  int32_t* list;

  bool allocate(const Attention& p) {
    const int64_t columns = padded(kPanel);
    const int64_t dim = padded(p.head_dim), value_dim = padded(p.value_dim);
    return carve(p, {{&query_t, p.head_dim * columns},
                     {&grad_t, p.value_dim * columns},
                     {&query, kPanel * dim},
                     {&grad, kPanel * value_dim},
                     {&scores, kBlock * columns},
                     {&grad_scores, kBlock * columns},
                     {&factor, p.dropout ? kBlock * columns : 0},
                     {&key, kBlock * dim},
                     {&value, kBlock * p.value_dim},
                     {&grad_query, kPanel * dim},
                     {&grad_key, p.kv_len * dim},
                     {&grad_value, p.kv_len * value_dim},
                     {&row, value_dim},
                     {&lse, columns},
                     {&delta, columns}},
                 &list);
  }
};

// P and dS of one block from the products in s.scores and s.grad_scores; P becomes P c.
inline void block_gradients(const AttentionBackward& p, int64_t b, int64_t h, int64_t first,
                            int64_t queries, const Keys& keys, int64_t block, int64_t count,
                            int64_t columns, const BackwardScratch& s) {
  mask_scores(p, b, h, first, queries, keys, block, count, columns, s.scores);
  if (p.dropout) dropout_factors(p, b, h, first, keys, block, count, columns, s.factor);
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < columns; i += Vec::kLanes) {
      const int64_t at = j * columns + i;
      const Vec p_ij = exp(Vec::load(s.scores + at) - Vec::load(s.lse + i));
      Vec grad = Vec::load(s.grad_scores + at), dropped = p_ij;
      if (p.dropout) {
        const Vec factor = Vec::load(s.factor + at);
        grad = grad * factor;
        dropped = dropped * factor;
      }
      dropped.store(s.scores + at);
      (p_ij * (grad - Vec::load(s.delta + i))).store(s.grad_scores + at);
    }
  }
  if (!p.grad_mask) return;
  float* to = p.grad_mask + b * p.grad_mask_batch + h * p.grad_mask_head +
              first * p.grad_mask_row;
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < queries; ++i)
      to[i * p.grad_mask_row + keys[block + j] * p.grad_mask_column] +=
          s.grad_scores[j * columns + i];
}

inline void backward_panel(const AttentionBackward& p, int64_t b, int64_t h, int64_t first,
                           const Keys& all_keys, const BackwardScratch& s) {
  const int64_t queries = p.q_len - first < kPanel ? p.q_len - first : kPanel;
  const int64_t columns = padded(queries);
  const int64_t dim = padded(p.head_dim), value_dim = padded(p.value_dim);
  const int64_t group = h / (p.heads / p.kv_heads);
  const int64_t query_offset = b * p.query.batch + h * p.query.head;
  const int64_t grad_offset = b * p.grad_out.batch + h * p.grad_out.head;
  const int64_t key_offset = b * p.key.batch + group * p.key.head;
  const int64_t value_offset = b * p.value.batch + group * p.value.head;
  const Keys every{p.q_len, nullptr};

  transpose(p.query, p.type, query_offset, first, queries, p.head_dim, columns, s.query_t);
  transpose(p.grad_out, p.type, grad_offset, first, queries, p.value_dim, columns, s.grad_t);
  const Rows query = rows(p.query, p.type, query_offset, every, first, queries, p.head_dim, dim,
                          s.query);
  const Rows grad = rows(p.grad_out, p.type, grad_offset, every, first, queries, p.value_dim,
                         value_dim, s.grad);
  for (int64_t i = 0; i < columns; ++i) {
    s.lse[i] = kInfinity, s.delta[i] = 0.0f;  // a row without keys, or past the end: P = 0
    if (i >= queries) continue;
    const float lse = p.lse[(b * p.heads + h) * p.q_len + first + i];
    if (lse != -kInfinity) s.lse[i] = lse;
    load(p.out.data, p.type, b * p.out.batch + h * p.out.head + (first + i) * p.out.row,
         p.out.column, p.value_dim, s.row);
    float delta = 0.0f;
    for (int64_t e = 0; e < p.value_dim; ++e) delta += s.row[e] * grad.data[i * grad.stride + e];
    if (p.grad_lse) {
      delta -= p.grad_lse[b * p.grad_lse_batch + h * p.grad_lse_head +
                          (first + i) * p.grad_lse_row];
    }
    s.delta[i] = delta;
  }
  for (int64_t i = 0; i < queries * dim; ++i) s.grad_query[i] = 0.0f;

  Keys keys = all_keys;
  while (p.causal && keys.count > 0 && keys[keys.count - 1] >= first + queries) {
    keys.count = keys.list ? keys.count - 1 : first + queries;
  }
  for (int64_t block = 0; block < keys.count; block += kBlock) {
    const int64_t count = keys.count - block < kBlock ? keys.count - block : kBlock;
    const Rows key = rows(p.key, p.type, key_offset, keys, block, count, p.head_dim, dim, s.key);
    const Rows value = rows(p.value, p.type, value_offset, keys, block, count, p.value_dim,
                            p.value_dim, s.value);
    multiply(key.data, key.stride, 1, s.query_t, columns, count, columns, p.head_dim, s.scores,
             columns, false);
    multiply(value.data, value.stride, 1, s.grad_t, columns, count, columns, p.value_dim,
             s.grad_scores, columns, false);
    block_gradients(p, b, h, first, queries, keys, block, count, columns, s);
    multiply(s.scores, columns, 1, grad.data, grad.stride, count, value_dim, queries,
             s.grad_value + block * value_dim, value_dim, true);
    multiply(s.grad_scores, columns, 1, query.data, query.stride, count, dim, queries,
             s.grad_key + block * dim, dim, true);
    multiply(s.grad_scores, 1, columns, key.data, key.stride, queries, dim, count, s.grad_query,
             dim, true);
  }
  for (int64_t i = 0; i < queries; ++i) {
    const MutableView& to = p.grad_query;
    store(to.data, p.type, b * to.batch + h * to.head + (first + i) * to.row, to.column,
          p.head_dim, s.grad_query + i * dim, p.scale);
  }
}

inline void backward_key_head(const AttentionBackward& p, int64_t b, int64_t group,
                              const BackwardScratch& s) {
  const int64_t dim = padded(p.head_dim), value_dim = padded(p.value_dim);
  const Keys keys = visible_keys(p, b, p.kv_len, s.list);
  for (int64_t i = 0; i < p.kv_len * dim; ++i) s.grad_key[i] = 0.0f;
  for (int64_t i = 0; i < p.kv_len * value_dim; ++i) s.grad_value[i] = 0.0f;
  const int64_t members = p.heads / p.kv_heads;
  for (int64_t h = group * members; h < (group + 1) * members; ++h)
    for (int64_t first = 0; first < p.q_len; first += kPanel)
      backward_panel(p, b, h, first, keys, s);

  const auto write = [&](const MutableView& to, int64_t j, int64_t count, const float* from,
                         float factor) {
    store(to.data, p.type, b * to.batch + group * to.head + j * to.row, to.column, count, from,
          factor);
  };
  // Rows past keys.count are still 0: what hidden keys get.
  int64_t next = 0, hidden = keys.count;
  for (int64_t j = 0; j < p.kv_len; ++j) {
    const bool visible = next < keys.count && keys[next] == j;
    const int64_t from = visible ? next++ : hidden++;
    write(p.grad_key, j, p.head_dim, s.grad_key + from * dim, p.scale);
    write(p.grad_value, j, p.value_dim, s.grad_value + from * value_dim, 1.0f);
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
  if (p.grad_mask && p.grad_mask_batch == 0) {
    key_heads = slices;
  } else if (p.grad_mask && p.grad_mask_head == 0) {
    key_heads = p.kv_heads;
  }
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(3 * p.head_dim + 2 * p.value_dim);
  run(parallel, slices / key_heads, flops, backward_tasks, BackwardTasks{&p, key_heads});
}

}  // namespace
}  // namespace ff
