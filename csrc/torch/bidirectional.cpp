// bidirectional_attention as torch ops.

#include "cpu_calls.h"

namespace {

Outputs forward(const BidirectionalInputs& in, bool lse) {
  ff::BidirectionalForward p;
  describe(p, in);
  const ff::KeyRangeTable ranges = describe_ranges(p);
  const Outputs made = make_outputs(p, in.query, lse);
  run(p, [&] { ff::kernels().bidirectional_forward(p, parallel_for); });
  return made;
}

std::tuple<Tensor, Tensor> bidirectional_out(const BidirectionalInputs& in) {
  const Outputs made = forward(in, false);
  return {made.out_q, made.out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(const BidirectionalInputs& in) {
  const Outputs made = forward(in, true);
  return {made.out_q, made.out_k, made.lse_q, made.lse_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_backward(
    const Gradients<4>& gradients, bool mask_gradient, const BidirectionalInputs& in) {
  ff::BidirectionalBackward p;
  describe(p, in);
  const ff::KeyRangeTable ranges = describe_ranges(p);
  const Kind kind = kind_of(in.query);
  const OutputGradient to_rows(gradients[0], {p.batch, p.heads, p.q_len, p.value_dim}, in.query);
  const OutputGradient to_columns(gradients[1], {p.batch, p.heads, p.kv_len, p.query_value_dim},
                                  in.query);
  p.grad_out_q = view(to_rows.tensor), p.grad_out_k = view(to_columns.tensor);
  p.grad_lse_q = lse_gradient(gradients[2], p.batch, p.heads, p.q_len);
  p.grad_lse_k = lse_gradient(gradients[3], p.batch, p.heads, p.kv_len);
  const auto gradient = [&](int64_t length, int64_t dim) {
    return empty_rows_outside(p.batch, p.heads, length, dim, kind);
  };
  Tensor grad_query = gradient(p.q_len, p.head_dim), grad_key = gradient(p.kv_len, p.head_dim);
  Tensor grad_value = gradient(p.kv_len, p.value_dim);
  Tensor grad_query_value = gradient(p.q_len, p.query_value_dim);
  p.grad_query = mutable_view(grad_query), p.grad_key = mutable_view(grad_key);
  p.grad_value = mutable_view(grad_value);
  p.grad_query_value = mutable_view(grad_query_value);
  const int64_t scores[4] = {p.batch, p.heads, p.q_len, p.kv_len};
  MaskGradientTensor grad_mask(p, scores, in.attn_mask, mask_gradient, kind, p.grad_mask);
  run(p, [&] { ff::kernels().bidirectional_backward(p, parallel_for); });
  return {grad_query, grad_key, grad_value, grad_query_value, grad_mask.tensor()};
}

constexpr Op kOps[] = {
    op<bidirectional_forward>("bidirectional"),
    op<bidirectional_forward>("bidirectional_forward"),
    op<bidirectional_forward>("bidirectional_forward.masks", 7),
    op<bidirectional_out>("bidirectional_out"),
    op<bidirectional_out>("bidirectional_out.masks", 7),
    op<bidirectional_backward>("bidirectional_backward"),
    op<bidirectional_backward>("bidirectional_backward.masks", 5 + 7),
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
