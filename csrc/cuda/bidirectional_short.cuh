// Attention in both directions where one side has at most 64 positions: the blocks of two calls of
// attention, the second with both sides exchanged, in one launch. Scores are there twice, which is
// little of a latency; to take maxima and sums along both sides of one matrix in shared memory took
// one block a head 7 us for 36 x 20 and 18 us for 64 x 196, on an H200.
#pragma once

#include "attention_short.cuh"

namespace ff::cuda {
namespace {

inline AttentionForward from_queries(const BidirectionalForward& p) {
  AttentionForward call{};
  static_cast<Attention&>(call) = p;
  call.out = p.out_q, call.lse = p.lse_q;
  return call;
}

inline AttentionForward from_keys(const BidirectionalForward& p) {
  AttentionForward call{};
  static_cast<Attention&>(call) = p;
  call.q_len = p.kv_len, call.kv_len = p.q_len, call.value_dim = p.query_value_dim;
  call.query = p.key, call.key = p.query, call.value = p.query_value;
  call.exchanged = true;
  call.mask.row = p.mask.column, call.mask.column = p.mask.row;
  call.padding = p.query_padding, call.padding_batch = p.query_padding_batch;
  call.padding_column = p.query_padding_column;
  call.out = p.out_k, call.lse = p.lse_k;
  return call;
}

struct ShortPair {
  AttentionForward calls[2];
  ShortPlan plans[2];
  uint32_t first;  // blocks of the first call

  int64_t blocks(int way) const {
    const ShortPlan& plan = plans[way];
    return calls[way].batch * calls[way].heads * plan.chunks.count * plan.groups.count;
  }
};

inline int pair_dim(const Bidirectional& p) {
  const int64_t values = p.value_dim > p.query_value_dim ? p.value_dim : p.query_value_dim;
  return padded_dim(p.head_dim, values);
}

// How a call goes this way, if it does: a matter of lengths and the device alone.
inline std::optional<ShortPair> short_pair(const BidirectionalForward& p, int capability) {
  if (p.q_len * p.kv_len == 0) return std::nullopt;
  ShortPair pair{{from_queries(p), from_keys(p)}, {}, 0};
  const int dim = pair_dim(p);
  const auto plan = [&](int way, int most_tiles) {
    const auto found = short_plan(pair.calls[way], capability, dim, most_tiles);
    if (found) pair.plans[way] = *found;
    return found && found->chunks.count == 1;
  };
  if (!plan(0, kMostTiles) || !plan(1, kMostTiles)) return std::nullopt;
  // Blocks have the same warps. Only one side can have more than 64 positions, and its slices.
  const int sliced = pair.plans[1].sliced ? 1 : 0;
  const int warps = pair.plans[sliced].slices * pair.plans[sliced].team;
  ShortPlan &fixed = pair.plans[sliced], &other = pair.plans[1 - sliced];
  if (fixed.sliced && !plan(1 - sliced, warps < kMostTiles ? warps : kMostTiles))
    return std::nullopt;
  if (!fixed.sliced) fixed.team = other.team = warps > other.team ? warps : other.team;
  other.team = fixed.slices * fixed.team;
  const int64_t first = pair.blocks(0);
  if (first + pair.blocks(1) > 0x7fffffff) return std::nullopt;
  pair.first = uint32_t(first);
  return pair;
}

template <class T, int kDim, bool kNatural>
FF_KERNEL(most_warps(kDim) * 32)
attention_both(const ShortPair pair) {
  const uint32_t block = uint32_t(block_index());
  const int way = block >= pair.first;
  attend_short<T, kDim, kNatural>(pair.calls[way], pair.plans[way], block - (way ? pair.first : 0));
}

template <class T>
const char* run_short_pair(const ShortPair& pair, int dim, void* stream) {
  return with_dim(dim, [&]<int kDim>() {
    const int first = short_bytes(pair.plans[0], kDim), second = short_bytes(pair.plans[1], kDim);
    const ShortPlan& plan = pair.plans[0];
    const Launch size{pair.blocks(0) + pair.blocks(1), plan.slices * plan.team * 32,
                      first > second ? first : second, stream};
    if (plan.natural) return launch<attention_both<T, kDim, true>>(size, pair);
    return launch<attention_both<T, kDim, false>>(size, pair);
  });
}

}  // namespace
}  // namespace ff::cuda
