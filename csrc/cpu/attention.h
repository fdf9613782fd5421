// Attention forward with transposed scores: lanes are queries and the rows of K are broadcast, so
// that K needs no packing, softmax is vertical and a NaN in a query stays in its own lane. Up to
// three queries leave most lanes empty: their scores are taken with lanes along the head dim.
//
// A task is a panel of 48 queries of one head. It walks the keys in blocks of 256 with the online
// softmax of Milakov and Gimelshein (2018): m the running maximum, l the sum, O the accumulator,
//     m' = max(m, max_j S)   O = O * exp(m - m') + exp(S - m') V   l = l * exp(m - m') + sum_j ...
#pragma once

#include "dropout.h"
#include "tile.h"

namespace ff {
namespace {

struct ForwardScratch {
  float *query, *scores, *factor, *key, *value, *out;
  Statistics statistics;
  int32_t* list;

  bool allocate(const Attention& p) {
    const int64_t columns = padded(kPanel), value_columns = padded(p.value_dim);
    return carve(p,
                 {{&query, p.head_dim * columns},
                  {&scores, kBlock * columns},
                  {&factor, p.dropout ? kBlock * columns : 0},
                  {&key, kBlock * padded(p.head_dim)},
                  {&value, kBlock * value_columns},
                  {&out, kPanel * value_columns},
                  {&statistics.maximum, columns},
                  {&statistics.sum, columns},
                  {&statistics.rescale, columns}},
                 &list);
  }
};

inline void forward_panel(const AttentionForward& p, int64_t b, int64_t h, int64_t first,
                          const ForwardScratch& s) {
  const int64_t queries = p.q_len - first < kPanel ? p.q_len - first : kPanel;
  const int64_t columns = padded(queries), value_columns = padded(p.value_dim);
  const int64_t group = h / (p.heads / p.kv_heads);
  const int64_t key_offset = b * p.key.batch + group * p.key.head;
  const int64_t value_offset = b * p.value.batch + group * p.value.head;
  const int64_t query_offset = b * p.query.batch + h * p.query.head;
  const bool few = p.q_len <= kFew;
  const int64_t dim = few ? padded(p.head_dim) : p.head_dim;
  Rows query{s.query, columns};
  if (few) {
    query = rows(p.query, p.type, query_offset, {p.q_len, nullptr}, first, queries, p.head_dim, dim,
                 s.query);
  } else {
    transpose(p.query, p.type, query_offset, first, queries, dim, columns, s.query);
  }
  s.statistics.clear(columns);
  for (int64_t i = 0; i < queries * value_columns; ++i) s.out[i] = 0.0f;

  int64_t limit = p.kv_len;
  if (p.causal && first + queries < limit) limit = first + queries;
  const Keys keys = visible_keys(p, b, limit, s.list);
  for (int64_t block = 0; block < keys.count; block += kBlock) {
    const int64_t count = keys.count - block < kBlock ? keys.count - block : kBlock;
    const Rows key = rows(p.key, p.type, key_offset, keys, block, count, p.head_dim, dim, s.key);
    if (few) {
      multiply_dot(key.data, key.stride, query.data, query.stride, count, queries, dim, s.scores,
                   columns);
    } else {
      multiply(key.data, key.stride, 1, s.query, columns, count, columns, dim, s.scores, columns,
               false);
    }
    mask_scores(p, b, h, first, queries, keys, block, count, columns, s.scores);
    online_softmax(count, columns, s.scores, s.statistics);
    if (p.dropout) {
      dropout_factors(p, b, h, first, keys, block, count, columns, s.factor);
      for (int64_t j = 0; j < count * columns; j += Vec::kLanes)
        (Vec::load(s.scores + j) * Vec::load(s.factor + j)).store(s.scores + j);
    }
    for (int64_t i = 0; i < queries; ++i)
      scale_row(s.out + i * value_columns, value_columns, s.statistics.rescale[i]);
    const Rows value = rows(p.value, p.type, value_offset, keys, block, count, p.value_dim,
                            value_columns, s.value);
    multiply(s.scores, 1, columns, value.data, value.stride, queries, value_columns, count, s.out,
             value_columns, true);
  }

  for (int64_t i = 0; i < queries; ++i) {
    const float sum = s.statistics.sum[i];
    const bool dead = sum == 0.0f;
    float* row = s.out + i * value_columns;
    if (!dead) divide_row(row, value_columns, sum);
    store(p.out.data, p.type, b * p.out.batch + h * p.out.head + (first + i) * p.out.row,
          p.out.column, p.value_dim, row);
    if (p.lse) {
      p.lse[(b * p.heads + h) * p.q_len + first + i] =
          dead ? -kInfinity : s.statistics.maximum[i] + std::log(sum);
    }
  }
}

inline void forward_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& p = *static_cast<const AttentionForward*>(context);
  const int64_t panels = (p.q_len + kPanel - 1) / kPanel;
  ForwardScratch s;
  if (!s.allocate(p)) return;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t slice = task / panels;
    forward_panel(p, slice / p.heads, slice % p.heads, task % panels * kPanel, s);
  }
}

inline void attention_forward(const AttentionForward& p, ParallelFor parallel) {
  const int64_t tasks = p.batch * p.heads * ((p.q_len + kPanel - 1) / kPanel);
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(p.head_dim + p.value_dim);
  if (tasks > 0) run(parallel, tasks, flops, forward_tasks, p);
}

}  // namespace
}  // namespace ff
