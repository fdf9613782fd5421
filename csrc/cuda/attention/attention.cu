// Attention forward on the current device: by type, and what is common to all.

#include "float32.cuh"
#include "short.cuh"
#include "tiles.cuh"
#include "cuda/by_type.h"

namespace ff::cuda {

bool runs(Type type, int capability) {
  return capability >= (type == Type::kBFloat16 ? 80 : 75) && type != Type::kBool;
}

int current_capability() { return compute_capability(); }

int64_t attention_workspace(const AttentionForward& p, int capability) {
  const auto plan = short_plan(p, capability);
  if (p.type == Type::kFloat32 || !plan) return 0;
  return short_workspace(p, *plan) * int64_t(sizeof(float));
}

const char* attention_path(const AttentionForward& p, int capability) {
  if (p.type == Type::kFloat32) return attention_float32_path(p, capability);
  const auto plan = short_plan(p, capability);
  if (!plan) {
    return takes_wide_tiles(p, capability) ? "blocks of 128 queries, tiles of keys"
                                           : "blocks of 64 queries, tiles of keys";
  }
  return plan->chunks == 1 ? "all keys in shared memory"
                           : "chunks of keys in shared memory, then combined";
}

const char* attention_forward(const AttentionForward& p, void* workspace, void* stream) {
  if (p.dropout) return "the CUDA kernels have no dropout";
  if (p.batch * p.heads * p.q_len == 0) return nullptr;
  const int capability = compute_capability();
  switch (p.type) {
    case Type::kFloat32:
      return attention_float32(p, stream);
    case Type::kFloat16:
      return attention_float16(p, capability, workspace, stream);
    case Type::kBFloat16:
      if (runs(p.type, capability)) return attention_bfloat16(p, capability, workspace, stream);
      return "bfloat16 needs compute capability 8.0";
    default:
      return "this dtype has no kernel";
  }
}

}  // namespace ff::cuda
