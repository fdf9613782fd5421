// bidirectional_attention as torch ops.

#include "torch_cpu.h"

namespace {

Results forward(ff::BidirectionalForward& p, const Tensor& query, bool lse) {
  const Results r = make_results(p, query, lse);
  run(p, [&] { ff::kernels().bidirectional_forward(p, parallel_for); });
  return r;
}

std::tuple<Tensor, Tensor> bidirectional_out(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const Tensor& query_value,
                                             MaybeTensor mask, MaybeTensor query_padding,
                                             MaybeTensor key_padding, MaybeTensor seed,
                                             double dropout_p, bool is_causal, bool bottom_right,
                                             std::optional<double> scale) {
  ff::BidirectionalForward p;
  describe(p, query, key, value, query_value, mask, query_padding, key_padding, seed, dropout_p,
           is_causal, bottom_right, scale);
  const Results r = forward(p, query, false);
  return {r.out_q, r.out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_value,
    MaybeTensor mask, MaybeTensor query_padding, MaybeTensor key_padding, MaybeTensor seed,
    double dropout_p, bool is_causal, bool bottom_right, std::optional<double> scale) {
  ff::BidirectionalForward p;
  describe(p, query, key, value, query_value, mask, query_padding, key_padding, seed, dropout_p,
           is_causal, bottom_right, scale);
  const Results r = forward(p, query, true);
  return {r.out_q, r.out_k, r.lse_q, r.lse_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bidirectional_backward(
    MaybeTensor grad_out_q, MaybeTensor grad_out_k, MaybeTensor grad_lse_q, MaybeTensor grad_lse_k,
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_value,
    MaybeTensor mask, MaybeTensor query_padding, MaybeTensor key_padding, MaybeTensor seed,
    double dropout_p, bool is_causal, bool bottom_right, std::optional<double> scale,
    bool mask_gradient) {
  ff::BidirectionalBackward p;
  describe(p, query, key, value, query_value, mask, query_padding, key_padding, seed, dropout_p,
           is_causal, bottom_right, scale);
  const Kind kind = kind_of(query);
  const int64_t rows[4] = {p.batch, p.heads, p.q_len, p.value_dim};
  const int64_t columns[4] = {p.batch, p.heads, p.kv_len, p.query_value_dim};
  const auto zeros = [&](const int64_t (&sizes)[4]) {
    return fill_zeros(empty_contiguous(4, sizes, kind));
  };
  const Tensor to_rows = grad_out_q ? *grad_out_q : zeros(rows);
  const Tensor to_columns = grad_out_k ? *grad_out_k : zeros(columns);
  p.grad_out_q = gradient_view(to_rows, rows, query.scalar_type());
  p.grad_out_k = gradient_view(to_columns, columns, query.scalar_type());
  p.grad_lse_q = lse_gradient(grad_lse_q, p.batch, p.heads, p.q_len);
  p.grad_lse_k = lse_gradient(grad_lse_k, p.batch, p.heads, p.kv_len);
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
  MaskGradientTensor grad_mask(p, scores, mask, mask_gradient, kind, p.grad_mask);
  run(p, [&] { ff::kernels().bidirectional_backward(p, parallel_for); });
  return {grad_query, grad_key, grad_value, grad_query_value, grad_mask.tensor()};
}

#define FF_INPUTS                                                                         \
  "Tensor query, Tensor key, Tensor value, Tensor query_value, Tensor? attn_mask, "       \
  "Tensor? query_padding_mask, Tensor? key_padding_mask, Tensor? seed, float dropout_p, " \
  "bool is_causal, bool bottom_right, float? scale"

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) {
  m.def("bidirectional(" FF_INPUTS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bidirectional_forward(" FF_INPUTS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("bidirectional_out(" FF_INPUTS ") -> (Tensor, Tensor)");
  m.def(
      "bidirectional_backward(Tensor? grad_0, Tensor? grad_1, Tensor? grad_2, Tensor? "
      "grad_3, " FF_INPUTS ", bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) {
  m.impl("bidirectional", TORCH_BOX(&bidirectional_forward));
  m.impl("bidirectional_forward", TORCH_BOX(&bidirectional_forward));
  m.impl("bidirectional_out", TORCH_BOX(&bidirectional_out));
  m.impl("bidirectional_backward", TORCH_BOX(&bidirectional_backward));
}

}  // namespace
