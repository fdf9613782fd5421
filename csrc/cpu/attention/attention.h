// Attention on the CPU: the entry points, and which way a call goes.
//
//     forward.h          query tiles walk blocks of keys: the inner loop, and its parts
//     tail_queries.h     the queries that are left over by whole registers of them
//     decode.h           up to three queries, one at a time
//     split_kv.h         few queries over many keys, which are cut into splits
//     backward.h, decode_backward.h
//     varlen.cpp         packed sequences
#pragma once

#include "backward.h"
#include "decode_backward.h"
#include "split_kv.h"

namespace ff {
namespace {

template <class HalfMath>
const char* attention_path(const AttentionForward& p) {
  if (p.q_len <= kDecodeLength) return "one query at a time";
  if (p.type == Type::kFloat32) return "tiles of 48 queries";
  const bool half = narrow_products(p) && !kTakesAll<HalfMath>;
  return half ? "tiles of 48 queries, bfloat16 products" : "tiles of 48 queries, as float32";
}

inline int64_t attention_splits(const AttentionForward& p) { return KvSplits(p).count; }

template <class HalfMath>
void attention_forward(const AttentionForward& p, ParallelFor parallel) {
  if constexpr (!kTakesAll<HalfMath>) {
    if (!narrow_products(p)) return HalfMath::kFloat32->attention_forward(p, parallel);
  }
  const KvSplits splits(p);
  if (attention_parts<HalfMath>(p) > 0 && splits.count > 1) {
    SplitKvTasks<HalfMath>(p, splits).run(parallel);
    return;
  }
  const double flops = 2.0 * double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len) *
                       double(p.head_dim + p.value_dim);
  const auto body = [](int64_t begin, int64_t end, const void* context) {
    attention_part<HalfMath>(*static_cast<const AttentionForward*>(context), begin, end);
  };
  ff::run(parallel, attention_parts<HalfMath>(p), flops, body, p);
}

// The tasks of a call: what is added to one sum is added by one task.
inline HeadTasks<AttentionBackward> backward_tasks(const AttentionBackward& p) {
  HeadTasks<AttentionBackward> tasks = gradient_tasks(p);
  if (tasks.entries < p.grad_positions.entries) tasks.entries = p.grad_positions.entries;
  return tasks;
}

template <class HalfMath>
void attention_backward_part(const AttentionBackward& p, int64_t begin, int64_t end) {
  if constexpr (!kTakesAll<HalfMath>) {
    if (!narrow_products(p)) return HalfMath::kFloat32->attention_backward_part(p, begin, end);
  }
  auto* body = head_tasks<BackwardTask<HalfMath>>;
  if (takes_decode_path(p)) {
    body = with_type(p.type,
                     [](auto kind) { return &head_tasks<DecodeBackwardTask<decltype(kind)>>; });
  }
  const auto tasks = backward_tasks(p);
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
  ff::run(parallel, backward_tasks(p).count(), flops, body, p);
}

}  // namespace
}  // namespace ff
