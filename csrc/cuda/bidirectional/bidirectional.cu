// Attention in both directions on the current device. Where a head does not fit into shared memory
// it is two calls of attention, the second with both sides exchanged: sums over the first side
// would have to leave the chip once per tile of it, which costs more than scores twice.

#include "cuda/by_type.h"
#include "short_pair.cuh"

namespace ff::cuda {
namespace {

AttentionForward from_queries(const BidirectionalForward& p) {
  AttentionForward call{};
  static_cast<Attention&>(call) = p;
  call.out = p.out_q, call.lse = p.lse_q;
  return call;
}

AttentionForward from_keys(const BidirectionalForward& p) {
  AttentionForward call{};
  static_cast<Attention&>(call) = p;
  call.q_len = p.kv_len, call.kv_len = p.q_len, call.value_dim = p.query_value_dim;
  call.query = p.key, call.key = p.query, call.value = p.query_value;
  call.exchanged = true;
  call.rules.q_segments = p.rules.k_segments, call.rules.k_segments = p.rules.q_segments;
  call.mask.row = p.mask.column, call.mask.column = p.mask.row;
  call.padding = p.query_padding, call.padding_batch = p.query_padding_batch;
  call.padding_column = p.query_padding_column;
  call.out = p.out_k, call.lse = p.lse_k;
  return call;
}

bool in_one(const BidirectionalForward& p, int capability) {
  return p.type != Type::kFloat32 && is_short_pair(p, capability);
}

}  // namespace

int64_t bidirectional_workspace(const BidirectionalForward& p, int capability) {
  if (in_one(p, capability)) return 0;
  const int64_t first = attention_workspace(from_queries(p), capability);
  const int64_t second = attention_workspace(from_keys(p), capability);
  return first > second ? first : second;  // one after the other
}

const char* bidirectional_path(const BidirectionalForward& p, int capability) {
  return in_one(p, capability) ? "both sides in shared memory, scores once"
                               : "two launches of attention";
}

const char* bidirectional_forward(const BidirectionalForward& p, void* workspace, void* stream) {
  if (p.dropout) return "the CUDA kernels have no dropout";
  if (p.batch * p.heads == 0) return nullptr;
  const int capability = compute_capability();
  if (!runs(p.type, capability)) return "this dtype has no kernel for the device";
  if (in_one(p, capability)) {
    return p.type == Type::kFloat16 ? bidirectional_float16(p, stream)
                                    : bidirectional_bfloat16(p, stream);
  }
  const char* error = attention_forward(from_queries(p), workspace, stream);
  return error ? error : attention_forward(from_keys(p), workspace, stream);
}

}  // namespace ff::cuda
