// scaled_dot_product_attention as torch ops.

#include "cpu_calls.h"

namespace {

Tensor forward(const AttentionInputs& in, Tensor* lse) {
  ff::AttentionForward p;
  describe(p, in);
  const ff::KeyRangeTable ranges = describe_ranges(p);
  Tensor out = make_out(p, in.query, lse);
  run(p, [&] { ff::kernels().attention_forward(p, parallel_for); });
  return out;
}

Tensor attention_out(const AttentionInputs& in) { return forward(in, nullptr); }

std::tuple<Tensor, Tensor> attention_forward(const AttentionInputs& in) {
  Tensor lse;
  Tensor out = forward(in, &lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(const Gradients<2>& gradients,
                                                                      bool mask_gradient,
                                                                      const AttentionInputs& in) {
  ff::AttentionBackward p;
  describe(p, in);
  const ff::KeyRangeTable ranges = describe_ranges(p);
  const Kind kind = kind_of(in.query);
  const OutputGradient grad_out(gradients[0], {p.batch, p.heads, p.q_len, p.value_dim}, in.query);
  p.grad_out = view(grad_out.tensor);
  p.grad_lse = lse_gradient(gradients[1], p.batch, p.heads, p.q_len);
  Tensor grad_query = empty_rows_outside(p.batch, p.heads, p.q_len, p.head_dim, kind);
  Tensor grad_key = empty_rows_outside(p.batch, p.kv_heads, p.kv_len, p.head_dim, kind);
  Tensor grad_value = empty_rows_outside(p.batch, p.kv_heads, p.kv_len, p.value_dim, kind);
  p.grad_query = mutable_view(grad_query), p.grad_key = mutable_view(grad_key);
  p.grad_value = mutable_view(grad_value);
  const int64_t scores[4] = {p.batch, p.heads, p.q_len, p.kv_len};
  MaskGradientTensor grad_mask(p, scores, in.attn_mask, mask_gradient, kind, p.grad_mask);
  const SinkGradient grad_sinks(p, in.sinks, p.batch, kind);
  run(p, [&] { ff::kernels().attention_backward(p, parallel_for); });
  return {grad_query, grad_key, grad_value, grad_mask.tensor(), grad_sinks.tensor()};
}

constexpr Op kOps[] = {
    op<attention_forward>("attention"),
    op<attention_forward>("attention_forward"),
    op<attention_forward>("attention_forward.qkv", 3),
    op<attention_forward>("attention_forward.masks", 5),
    op<attention_out>("attention_out"),
    op<attention_out>("attention_out.qkv", 3),
    op<attention_out>("attention_out.masks", 5),
    op<attention_backward>("attention_backward"),
    op<attention_backward>("attention_backward.qkv", 3 + 3),
    op<attention_backward>("attention_backward.masks", 3 + 5),
};

STABLE_TORCH_LIBRARY(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
