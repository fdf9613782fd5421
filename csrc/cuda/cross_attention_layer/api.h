// The interface of the fused cross-attention layer, beside ../api.h, whose rules it shares:
//
//   y = residual + out_proj(attention(q_proj(norm_q(x)), k_proj(norm_c(c)), v_proj(norm_c(c))))
//
// for x (B, Lq, query_dim) and c (B, Lk, context_dim) of float16 or bfloat16, in three launches:
// norms with projections of both inputs, attention, output projection.
#pragma once

#include "cuda/api.h"

namespace ff::cuda {

// (B, L, width) with rows of adjacent values.
struct Sequence {
  const void* data = nullptr;
  int64_t batch = 0, row = 0;
};

enum class NormKind : int32_t { kNone, kLayer, kRms };

// Over a row of the input; `weight` and `bias` (width,) may each be null.
struct Norm {
  NormKind kind = NormKind::kNone;
  const void* weight = nullptr;
  const void* bias = nullptr;
  float eps = 0.0f;
};

// `weight` (out, in) as torch.nn.Linear has it, contiguous: in place it is in the order that tensor
// cores are fed in here, so there is nothing to arrange. `bias` (out,) may be null.
struct Linear {
  const void* weight = nullptr;
  const void* bias = nullptr;
};

// Of Attention, `query`, `key`, `value`, `kv_heads` and `value_dim` are the layer's own, `causal`
// and the mask as there, `head_dim` up to 256. All tensors but the mask are of `type`.
struct CrossAttentionLayer : Attention {
  int64_t query_dim, context_dim, out_dim;
  Sequence x, context;
  Norm query_norm, context_norm;
  Linear q_proj;        // (heads * head_dim, query_dim)
  Linear kv_proj;       // (2 * heads * head_dim, context_dim), keys before values
  Linear out_proj;      // (out_dim, heads * head_dim)
  Sequence residual;    // (B, Lq, out_dim); no data: none
  void* out = nullptr;  // (B, Lq, out_dim), contiguous
};

// Bytes of device memory, aligned to 256, that a call needs.
FF_CUDA_EXPORT int64_t cross_attention_layer_workspace(const CrossAttentionLayer& call,
                                                       int capability);

// Rows have to fit into shared memory, 16 at a time: 1,792 values on every device.
FF_CUDA_EXPORT const char* cross_attention_layer(const CrossAttentionLayer& call, void* workspace,
                                                 void* stream);

// How the attention inside runs, for people.
FF_CUDA_EXPORT const char* cross_attention_layer_path(const CrossAttentionLayer& call,
                                                      int capability);

}  // namespace ff::cuda
