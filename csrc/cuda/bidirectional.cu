// Attention in both directions on the current device: two calls of attention, the second with both
// sides exchanged, in one launch where one side is short. Sums over the first side would have to
// leave the chip once per tile of it, which costs more than scores twice.

#include "attention_types.h"
#include "bidirectional_short.cuh"

namespace ff::cuda {
namespace {

bool in_one(const BidirectionalForward& p, int capability) {
  return p.type != Type::kFloat32 && short_pair(p, capability);
}

}  // namespace

int64_t bidirectional_workspace(const BidirectionalForward& p, int capability) {
  if (in_one(p, capability)) return 0;
  const int64_t first = attention_workspace(from_queries(p), capability);
  const int64_t second = attention_workspace(from_keys(p), capability);
  return first > second ? first : second;  // one after the other
}

const char* bidirectional_path(const BidirectionalForward& p, int capability) {
  return in_one(p, capability) ? "both directions in one launch, a short side in shared memory"
                               : "two launches of attention";
}

const char* bidirectional_forward(const BidirectionalForward& p, void* workspace, void* stream) {
  if (p.dropout) return "the CUDA kernels have no dropout";
  if (p.batch * p.heads == 0) return nullptr;
  const int capability = compute_capability();
  if (!runs(p.type, capability)) return "this dtype has no kernel for the device";
  if (in_one(p, capability)) {
    return p.type == Type::kFloat16 ? bidirectional_float16(p, capability, stream)
                                    : bidirectional_bfloat16(p, capability, stream);
  }
  const char* error = attention_forward(from_queries(p), workspace, stream);
  return error ? error : attention_forward(from_keys(p), workspace, stream);
}

}  // namespace ff::cuda
