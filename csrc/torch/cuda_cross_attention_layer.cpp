// The fused cross-attention layer as a torch op, beside those of cuda.cpp.

#include "cuda_calls.h"

#include <list>

#include "cuda/cross_attention_layer/api.h"

namespace {

// What a call reads, kept alive, where the kernels want adjacent values.
class Operands {
 public:
  Operands(const Tensor& query, int64_t batch) : query_(query), batch_(batch) {}

  cuda::Sequence sequence(const Tensor& t, int64_t length, int64_t width, const char* name) {
    check_fits(is_like_query(t) && t.dim() == 3 && t.size(0) == batch_ && t.size(1) == length &&
                   t.size(2) == width,
               name);
    const Tensor& kept = keep(t, width > 1 && t.stride(2) != 1);
    // A stride over one element may be anything, and would pass for one that is not aligned.
    return {kept.const_data_ptr(), batch_ > 1 ? kept.stride(0) : 0,
            length > 1 ? kept.stride(1) : 0};
  }

  cuda::Linear linear(const Tensor& weight, const MaybeTensor& bias, int64_t features,
                      int64_t width, const char* name) {
    check_fits(is_like_query(weight) && weight.dim() == 2 && weight.size(0) == features &&
                   weight.size(1) == width,
               name);
    return {keep(weight, !weight.is_contiguous()).const_data_ptr(), vector(bias, features, name)};
  }

  cuda::Norm norm(std::optional<double> eps, bool rms, const MaybeTensor& weight,
                  const MaybeTensor& bias, int64_t width, const char* name) {
    if (!eps) return {};
    const auto kind = rms ? cuda::NormKind::kRms : cuda::NormKind::kLayer;
    return {kind, vector(weight, width, name), vector(bias, width, name), float(*eps)};
  }

 private:
  const void* vector(const MaybeTensor& t, int64_t size, const char* name) {
    if (!t) return nullptr;
    check_fits(is_like_query(*t) && t->dim() == 1 && t->size(0) == size, name);
    return keep(*t, !t->is_contiguous()).const_data_ptr();
  }

  bool is_like_query(const Tensor& t) const {
    return is_here(t, query_) && t.scalar_type() == query_.scalar_type();
  }

  const Tensor& keep(const Tensor& t, bool copied) {
    return copied ? copies_.emplace_back(torch::stable::contiguous(t)) : t;
  }

  const Tensor& query_;
  int64_t batch_;
  std::list<Tensor> copies_;
};

struct Layer {
  const CrossAttentionLayerInputs& in;
  Device device;
  Operands operands;
  cuda::CrossAttentionLayer p;
  int capability;

  explicit Layer(const CrossAttentionLayerInputs& inputs)
      : in(inputs),
        device(in.query),
        operands(in.query, in.query.dim() > 0 ? in.query.size(0) : 0) {
    const Tensor &query = in.query, &q_weight = in.q_weight, &out_weight = in.out_weight;
    STD_TORCH_CHECK(in.context && in.kv_weight && !in.key && !in.value,
                    "fastfusion: the CUDA kernels project the context themselves");
    const Tensor &context = *in.context, &kv_weight = *in.kv_weight;
    check_fits(query.dim() == 3 && context.dim() == 3 && query.size(2) > 0 && context.size(2) > 0,
               "query or context");
    check_fits(q_weight.dim() == 2 && out_weight.dim() == 2 && in.num_heads > 0 &&
                   q_weight.size(0) > 0 && q_weight.size(0) % in.num_heads == 0,
               "q_weight");
    const int64_t inner = q_weight.size(0);
    p.batch = query.size(0), p.q_len = query.size(1), p.kv_len = context.size(1);
    p.heads = p.kv_heads = in.num_heads, p.head_dim = p.value_dim = inner / in.num_heads;
    p.query_dim = query.size(2), p.context_dim = context.size(2), p.out_dim = out_weight.size(0);
    p.type = kernel_type(query.scalar_type());

    p.x = operands.sequence(query, p.q_len, p.query_dim, "query");
    p.context = operands.sequence(context, p.kv_len, p.context_dim, "context");
    p.q_proj = operands.linear(q_weight, in.q_bias, inner, p.query_dim, "q_weight or its bias");
    p.kv_proj =
        operands.linear(kv_weight, in.kv_bias, 2 * inner, p.context_dim, "kv_weight or its bias");
    p.out_proj =
        operands.linear(out_weight, in.out_bias, p.out_dim, inner, "out_weight or its bias");
    p.query_norm = operands.norm(in.query_norm_eps, in.rms_norm, in.query_norm_weight,
                                 in.query_norm_bias, p.query_dim, "the norm of query");
    p.context_norm = operands.norm(in.context_norm_eps, in.rms_norm, in.context_norm_weight,
                                   in.context_norm_bias, p.context_dim, "the norm of context");
    if (in.residual) p.residual = operands.sequence(*in.residual, p.q_len, p.out_dim, "residual");
    describe_masks(p, query, in.attn_mask, in.key_padding_mask);
    describe_scale(p, in.scale);
    capability = check_kernels(p);
  }

  Tensor run() {
    const int64_t sizes[] = {p.batch, p.q_len, p.out_dim};
    Tensor out = empty_contiguous(3, sizes, kind_of(in.query));
    p.out = out.mutable_data_ptr();
    const Workspace workspace(cuda::cross_attention_layer_workspace(p, capability), in.query);
    check_launch(cuda::cross_attention_layer(p, workspace.data, device.stream()));
    return out;
  }
};

Tensor layer_forward(const CrossAttentionLayerInputs& in) { return Layer(in).run(); }

std::string layer_path(const CrossAttentionLayerInputs& in) {
  const Layer call(in);
  return std::string("three launches, ") +
         cuda::cross_attention_layer_path(call.p, call.capability);
}

constexpr Op kOps[] = {
    op<layer_forward>("cuda_cross_attention_layer_forward"),
    op<layer_path>("cuda_cross_attention_layer_path"),
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, FF_DEVICE_KEY, m) { implement(m, kOps); }

}  // namespace
