// scaled_dot_product_attention as torch ops.

#include "torch_cpu.h"

namespace {

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
               const MaybeTensor& padding, const MaybeTensor& seed, double dropout_p,
               bool is_causal, bool bottom_right, std::optional<double> scale, bool enable_gqa,
               Tensor* lse) {
  ff::AttentionForward p;
  describe(p, query, key, value, mask, padding, seed, dropout_p, is_causal, bottom_right, scale);
  STD_TORCH_CHECK(enable_gqa || p.heads == p.kv_heads || p.kv_heads == 1,
                  "fastfusion: more query heads than key heads need enable_gqa");
  Tensor out = empty_rows_outside(p.batch, p.heads, p.q_len, p.value_dim, kind_of(query));
  p.out = mutable_view(out);
  if (lse) {
    const int64_t sizes[] = {p.batch, p.heads, p.q_len};
    *lse = empty_contiguous(3, sizes, float32_beside(query));
    p.lse = mutable_lse(*lse);
  }
  run(p, [&] { ff::kernels().attention_forward(p, parallel_for); });
  return out;
}

Tensor attention_out(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                     MaybeTensor padding, MaybeTensor seed, double dropout_p, bool is_causal,
                     bool bottom_right, std::optional<double> scale, bool enable_gqa) {
  return forward(query, key, value, mask, padding, seed, dropout_p, is_causal, bottom_right, scale,
                 enable_gqa, nullptr);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key,
                                             const Tensor& value, MaybeTensor mask,
                                             MaybeTensor padding, MaybeTensor seed,
                                             double dropout_p, bool is_causal, bool bottom_right,
                                             std::optional<double> scale, bool enable_gqa) {
  Tensor lse;
  Tensor out = forward(query, key, value, mask, padding, seed, dropout_p, is_causal, bottom_right,
                       scale, enable_gqa, &lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, MaybeTensor grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, MaybeTensor mask, MaybeTensor padding, MaybeTensor seed, double dropout_p,
    bool is_causal, bool bottom_right, std::optional<double> scale, bool mask_gradient) {
  ff::AttentionBackward p;
  describe(p, query, key, value, mask, padding, seed, dropout_p, is_causal, bottom_right, scale);
  p.grad_out =
      gradient_view(grad_out, {p.batch, p.heads, p.q_len, p.value_dim}, query.scalar_type());
  p.grad_lse = lse_gradient(grad_lse, p.batch, p.heads, p.q_len);
  const Kind kind = kind_of(query);
  Tensor grad_query = empty_rows_outside(p.batch, p.heads, p.q_len, p.head_dim, kind);
  Tensor grad_key = empty_rows_outside(p.batch, p.kv_heads, p.kv_len, p.head_dim, kind);
  Tensor grad_value = empty_rows_outside(p.batch, p.kv_heads, p.kv_len, p.value_dim, kind);
  p.grad_query = mutable_view(grad_query), p.grad_key = mutable_view(grad_key);
  p.grad_value = mutable_view(grad_value);
  const int64_t scores[4] = {p.batch, p.heads, p.q_len, p.kv_len};
  MaskGradientTensor grad_mask(p, scores, mask, mask_gradient, kind, p.grad_mask);
  run(p, [&] { ff::kernels().attention_backward(p, parallel_for); });
  return {grad_query, grad_key, grad_value, grad_mask.tensor()};
}

#define FF_INPUTS                                                                         \
  "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, " \
  "Tensor? seed"
#define FF_OPTIONS "float dropout_p, bool is_causal, bool bottom_right, float? scale"

STABLE_TORCH_LIBRARY(fastfusion, m) {
  m.def("attention(" FF_INPUTS ", " FF_OPTIONS ", bool enable_gqa) -> (Tensor, Tensor)");
  m.def("attention_forward(" FF_INPUTS ", " FF_OPTIONS ", bool enable_gqa) -> (Tensor, Tensor)");
  m.def("attention_out(" FF_INPUTS ", " FF_OPTIONS ", bool enable_gqa) -> Tensor");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, " FF_INPUTS ", " FF_OPTIONS
        ", bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_forward));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
