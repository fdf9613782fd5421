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

namespace {

template <class Call>
int64_t half_workspace(const Call& p, int capability) {
  const auto plan = short_plan(p, capability);
  return plan ? short_workspace(p, *plan) * int64_t(sizeof(float)) : 0;
}

template <class Call>
const char* half_path(const Call& p, int capability) {
  const auto plan = short_plan(p, capability);
  if (!plan) {
    return takes_wide_tiles(p, capability) ? "blocks of 128 queries, tiles of keys"
                                           : "blocks of 64 queries, tiles of keys";
  }
  return plan->chunks == 1 ? "all keys in shared memory"
                           : "chunks of keys in shared memory, then combined";
}

}  // namespace

int64_t attention_workspace(const AttentionForward& p, int capability) {
  return p.type == Type::kFloat32 ? 0 : half_workspace(p, capability);
}

const char* attention_path(const AttentionForward& p, int capability) {
  return p.type == Type::kFloat32 ? attention_float32_path(p, capability)
                                  : half_path(p, capability);
}

bool runs_float8(Type type, int capability) {
  return capability >= 89 && (type == Type::kFloat16 || type == Type::kBFloat16);
}

int64_t attention_workspace(const Float8Forward& p, int capability) {
  return half_workspace(p, capability);
}

const char* attention_path(const Float8Forward& p, int capability) {
  return half_path(p, capability);
}

const char* attention_forward(const Float8Forward& p, void* workspace, void* stream) {
  const int capability = compute_capability();
  if (p.dropout) return "the CUDA kernels have no dropout";
  if (!runs_float8(p.type, capability))
    return "keys of 8 bits need queries of 16 and compute capability 8.9";
  if (p.batch * p.heads * p.q_len == 0) return nullptr;
  if (p.type == Type::kFloat16) return attention_float16(p, capability, workspace, stream);
  return attention_bfloat16(p, capability, workspace, stream);
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
