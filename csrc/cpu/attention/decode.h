// The decode path, attention forward for up to three queries: one at a time, lanes along the head
// dim for the scores and along the value dim for the sum, so that K and V are streamed once, in
// place.
#pragma once

#include "cpu/gemm/packing.h"
#include "cpu/softmax/dropout.h"
#include "cpu/softmax/epilogue.h"
#include "cpu/softmax/online_softmax.h"
#include "cpu/task.h"

namespace ff {
namespace {

struct DecodeScratch {
  float *query, *scores, *factor, *out, *copy;
  int32_t* list;

  bool allocate(const Attention& p) {
    const bool copies = p.key.column != 1 || p.value.column != 1;
    const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
    return carve(p, {{&query, padded(p.head_dim)},
                     {&scores, kBlock},
                     {&factor, p.dropout ? kBlock : 0},
                     {&out, padded(p.value_dim)},
                     {&copy, copies ? kBlock * widest : 0},
                     {&list, p.padding ? p.kv_len : 0}});
  }
};

// The rows of a block.
template <class T>
struct Rows {
  const typename T::Element* data;
  int64_t stride;
  const Block* block;  // or none, where they are adjacent

  const typename T::Element* operator[](int64_t i) const {
    return data + (block ? (*block)[i] : i) * stride;
  }

  // Fetches what stands at the same place some rows later: 16 rows are too many streams for the
  // machine to follow by itself. One query over 1024 keys takes 0.87 of the time.
  void fetch_ahead(const typename T::Element* p) const { __builtin_prefetch(p + 16 * stride); }
};

// Calls `body` with the rows of a block: in place if their columns are adjacent, else as a copy.
template <class T, class Body>
inline void with_rows(const Slice& from, const Block& block, int64_t dim, float* copy,
                      const Body& body) {
  using Element = typename T::Element;
  if (from.column != 1) {
    convert_rows(from, block, dim, dim, copy);
    body(Rows<Float32>{copy, dim, nullptr});
  } else if (block.adjacent()) {
    body(Rows<T>{from.at<Element>(block[0]), from.row, nullptr});
  } else {
    body(Rows<T>{from.at<Element>(0), from.row, &block});
  }
}

// sum_d query[d] row[d] for kLanes rows from `first` on.
template <class T>
inline Vec dot_products(const float* query, const Rows<T>& rows, int64_t first, int64_t count,
                        int64_t dim) {
  constexpr int64_t kLanes = Vec::kLanes;
  Vec sum[kLanes];
  const typename T::Element* row[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    sum[i] = Vec::zero();
    row[i] = rows[first + (i < count ? i : count - 1)];
  }
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    const Vec x = Vec::load(query + d);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      rows.fetch_ahead(row[i] + d);
      sum[i] = Vec::fma(x, T::load(row[i] + d, kLanes), sum[i]);
    }
  }
  if (d < dim) {
    const Vec x = Vec::load(query + d);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) sum[i] = Vec::fma(x, T::load(row[i] + d, dim - d), sum[i]);
  }
  return Vec::totals(sum);
}

// out[d ..] = out * rescale + sum_j weight[j] row[j] for N registers of columns, the last of which
// holds `some`; in two chains of every other key.
template <int N, class T>
inline void add_columns(const float* weight, const Rows<T>& rows, int64_t count, int64_t d,
                        int64_t some, float rescale, float* out) {
  constexpr int64_t kLanes = Vec::kLanes;
  Vec even[N], odd[N];
  for (int n = 0; n < N; ++n) even[n] = odd[n] = Vec::zero();
  const auto add = [&](int64_t j, Vec(&sum)[N]) __attribute__((always_inline)) {
    const Vec x = Vec::set(weight[j]);
    const auto* row = rows[j] + d;
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      rows.fetch_ahead(row + n * kLanes);
      sum[n] = Vec::fma(x, T::load(row + n * kLanes, n + 1 < N ? kLanes : some), sum[n]);
    }
  };
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    add(j, even);
    add(j + 1, odd);
  }
  if (j < count) add(j, even);
  for (int n = 0; n < N; ++n) {
    float* to = out + d + n * kLanes;
    Vec::fma(Vec::load(to), Vec::set(rescale), even[n] + odd[n]).store(to);
  }
}

// out = out * rescale + sum_j weight[j] row[j], `out` padded to whole registers.
template <class T>
inline void add_rows(const float* weight, const Rows<T>& rows, int64_t count, int64_t dim,
                     float rescale, float* out) {
  constexpr int64_t kLanes = Vec::kLanes;
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes)
    add_columns<4>(weight, rows, count, d, kLanes, rescale, out);
  for (; d < dim; d += kLanes)
    add_columns<1>(weight, rows, count, d, dim - d < kLanes ? dim - d : kLanes, rescale, out);
}

struct RowStatistics {
  float maximum = -kInfinity, sum = 0.0f;
};

// A step of the online softmax with lanes along the keys, in place; returns exp(m - m'). The
// scores past the block's end, up to the next register, have to be -inf.
inline float row_softmax(int64_t count, float* scores, RowStatistics& s) {
  Vec largest = Vec::set(s.maximum);
  for (int64_t j = 0; j < count; j += Vec::kLanes)
    largest = Vec::max(Vec::load(scores + j), largest);
  float lanes[Vec::kLanes], now = s.maximum;
  largest.store(lanes);
  for (const float lane : lanes) now = lane > now ? lane : now;
  const Vec offset = finite(Vec::set(now));
  FourSums sum;
  for (int64_t j = 0; j < count; j += Vec::kLanes) {
    const Vec weight = exponential(Vec::load(scores + j), 1.0f, offset);
    weight.store(scores + j);
    Vec& part = sum.part[j / Vec::kLanes % 4];
    part = part + weight;
  }
  exponential(Vec::set(s.maximum), 1.0f, offset).store(lanes);
  s.maximum = now;
  s.sum = std::fma(s.sum, lanes[0], sum.total().total());
  return lanes[0];
}

template <class T>
void decode_row(const AttentionForward& p, int64_t b, int64_t h, int64_t query,
                const Positions& keys, const DecodeScratch& s) {
  constexpr int64_t kLanes = Vec::kLanes;
  const int64_t group = h / (p.heads / p.kv_heads);
  const Slice key(p.key, p.type, b, group), value(p.value, p.type, b, group);
  for (int64_t i = 0; i < padded(p.value_dim); ++i) s.out[i] = 0.0f;
  load(p.query.data, p.type, b * p.query.batch + h * p.query.head + query * p.query.row,
       p.query.column, p.head_dim, padded(p.head_dim), s.query);
  const Scaling scaling = scaling_of<Float32Math>(p.scale, Base::kE);
  const Vec unit = Vec::set(scaling.unit);
  for (int64_t i = 0; i < p.head_dim; ++i) s.query[i] *= scaling.factor;
  const FirstStatistics first(p, h, Base::kE);
  RowStatistics statistics{first.maximum, first.sum};
  for (int64_t done = 0; done < keys.count; done += kBlock) {
    const Block block = block_at(keys, done);
    with_rows<T>(key, block, p.head_dim, s.copy, [&](const auto& rows) {
      for (int64_t j = 0; j < block.count; j += kLanes)
        (dot_products(s.query, rows, j, block.count - j, p.head_dim) * unit).store(s.scores + j);
    });
    const Scores scores{p, b, h, one(query), 1, s.scores};
    make_row(scores, block);
    for (int64_t j = block.count; j < padded(block.count); ++j) s.scores[j] = -kInfinity;
    const float rescale = row_softmax(block.count, s.scores, statistics);
    if (p.dropout) {
      dropout_factors(scores, block, kRowStream, s.factor);
      for (int64_t j = 0; j < block.count; ++j) s.scores[j] *= s.factor[j];
    }
    with_rows<T>(value, block, p.value_dim, s.copy, [&](const auto& rows) {
      add_rows(s.scores, rows, block.count, p.value_dim, rescale, s.out);
    });
  }
  const float sum = statistics.sum;
  store(p.out.data, p.out_type(), b * p.out.batch + h * p.out.head + query * p.out.row,
        p.out.column, p.value_dim, inverse(sum), s.out);
  float *maximum = &statistics.maximum, *total = &statistics.sum;
  store_lse(p.lse, p.sums, b, h, one(query), {maximum, total, nullptr}, Base::kE);
}

// A task is a key head, whose keys and values stay in cache for the query heads that share them.
inline void decode_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& p = *static_cast<const AttentionForward*>(context);
  const int64_t members = p.heads / p.kv_heads;
  DecodeScratch s;
  if (!s.allocate(p)) return;
  with_type(p.type, [&](auto kind) {
    for (int64_t slice = begin; slice < end; ++slice)
      for (int64_t row = 0; row < members * p.q_len; ++row) {
        const int64_t b = slice / p.kv_heads, query = row % p.q_len;
        const int64_t h = slice % p.kv_heads * members + row / p.q_len;
        const KeyRange seen = keys_seen(p, b, one(query));
        const Positions keys = visible_keys(p, b, seen.first, seen.end, s.list);
        decode_row<decltype(kind)>(p, b, h, query, keys, s);
      }
  });
}

}  // namespace
}  // namespace ff
