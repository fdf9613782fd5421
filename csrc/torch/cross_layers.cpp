// cross_attention_layer and cross_modal_layer as torch ops.

#include "layers.h"

namespace {

void check_sequence(const Tensor& t, const Tensor& query, const char* name) {
  check_fits(t.is_cpu() && t.dim() == 3 && t.size(2) > 0 && t.size(0) == query.size(0) &&
                 t.scalar_type() == query.scalar_type(),
             name);
}

// What projects the context, by one weight or two.
void describe_keys_and_values(ff::CrossAttentionLayer& p, LayerOperands& operands,
                              const CrossAttentionLayerInputs& in, int64_t inner) {
  const auto context = operands.matrix(*in.context);
  p.context = context.data, p.context_row = context.stride;
  ff::Weight *const key = p.kv_proj.each, *const value = key + 1;
  int64_t features;
  *key = operands.weight(*in.kv_weight, in.kv_scale, in.kv_bias, p.context_dim, &features,
                         "kv_weight or its bias");
  if (in.value_context) {
    check_sequence(*in.value_context, in.query, "value_context");
    check_fits(
        in.v_weight && !in.context_norm_eps && in.value_context->size(1) == p.attention.kv_len,
        "value_context");
    const auto values = operands.matrix(*in.value_context);
    p.value_context = values.data, p.value_row = values.stride;
    p.value_dim = in.value_context->size(2);
  }
  *value = operands.maybe_weight({in.v_weight, in.v_scale, in.v_bias},
                                 in.value_context ? p.value_dim : p.context_dim, inner,
                                 "v_weight or its bias");
  p.kv_proj.count = in.v_weight ? 2 : 1;
  check_fits(features * p.kv_proj.count == 2 * inner, "kv_weight");
  p.attention.type = in.v_weight ? type_of_products(p.type, {p.q_proj, *key, *value})
                                 : type_of_products(p.type, {p.q_proj, *key});
}

Tensor cross_attention_layer_forward(const CrossAttentionLayerInputs& in) {
  check_sequence(in.query, in.query, "query");
  LayerOperands operands(in.query);
  bool out_of_memory = false;
  ff::CrossAttentionLayer p{};
  p.type = operands.type, p.query_dim = in.query.size(2);
  ff::AttentionForward& attention = p.attention;
  attention.batch = in.query.size(0), attention.q_len = in.query.size(1);
  int64_t inner;
  p.q_proj = operands.weight(in.q_weight, in.q_scale, in.q_bias, p.query_dim, &inner, "q_weight");
  describe_heads(attention, p.type, in.num_heads, inner);
  p.out_proj = operands.weight(in.out_weight, in.out_scale, in.out_bias, inner, &p.out_dim,
                               "out_weight or its bias");
  if (in.context) {
    check_sequence(*in.context, in.query, "context");
    check_fits(bool(in.kv_weight) && !in.key && !in.value, "context");
    attention.kv_len = in.context->size(1), p.context_dim = in.context->size(2);
    describe_keys_and_values(p, operands, in, inner);
  } else {
    check_fits(in.key && in.value && !in.kv_weight && !in.kv_scale && !in.v_weight &&
                   !in.value_context && in.key->dim() == 4,
               "key");
    attention.kv_len = in.key->size(2);
    for (const MaybeTensor* t : {&in.key, &in.value})
      check_heads(**t, attention, attention.kv_len, "key or value");
    attention.key = view(*in.key), attention.value = view(*in.value);
  }
  STD_TORCH_CHECK(attention.q_len <= INT32_MAX && attention.kv_len <= INT32_MAX,
                  "fastfusion: too long");
  ff::Norm query_norm, context_norm;
  if (in.query_norm_eps) {
    query_norm = operands.norm(in.query_norm_weight, in.query_norm_bias, *in.query_norm_eps,
                               p.query_dim, "the norm of query");
    query_norm.rms = in.rms_norm, p.query_norm = &query_norm;
  }
  if (in.context_norm_eps) {
    check_fits(bool(in.context), "the norm of context");
    context_norm = operands.norm(in.context_norm_weight, in.context_norm_bias, *in.context_norm_eps,
                                 p.context_dim, "the norm of context");
    context_norm.rms = in.rms_norm, p.context_norm = &context_norm;
  }
  describe_masks(attention, in.query, in.attn_mask, in.key_padding_mask);
  describe_scale(attention, in.scale);
  const int64_t sizes[] = {attention.batch, attention.q_len, p.out_dim};
  if (in.residual) {
    const auto residual = operands.residual(*in.residual, sizes, 3);
    p.residual = residual.data, p.residual_row = residual.stride;
  }
  const Tensor out = empty_contiguous(3, sizes, kind_of(in.query));
  if (out.numel() == 0) return out;
  const auto query = operands.matrix(in.query);
  p.query = query.data, p.query_row = query.stride;
  p.out = out.mutable_data_ptr();
  attention.out_of_memory = &out_of_memory;
  ff::kernels().cross_attention_layer(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return out;
}

// `inner`: what both streams are projected to; that of the first sets it.
void describe_stream(ff::FusionStream& s, LayerOperands& operands, const Tensor& tokens,
                     const StreamInputs& in, const StreamScales& scales, double eps1, double eps2,
                     int64_t* inner) {
  s.length = tokens.size(1), s.width = tokens.size(2);
  STD_TORCH_CHECK(s.length <= INT32_MAX, "fastfusion: too long");
  int64_t features;
  s.in_proj =
      operands.weight(in.in_weight, scales.in_scale, in.in_bias, s.width, &features, "in_weight");
  if (*inner == 0) *inner = features / 2;
  check_fits(features == 2 * *inner && *inner > 0, "in_weight");
  s.out_proj =
      operands.weight(in.out_weight, scales.out_scale, in.out_bias, *inner, s.width, "out_weight");
  s.linear1 = operands.weight(in.linear1_weight, scales.linear1_scale, in.linear1_bias, s.width,
                              &s.hidden, "linear1_weight");
  check_fits(s.hidden > 0, "linear1_weight");
  s.linear2 = operands.weight(in.linear2_weight, scales.linear2_scale, in.linear2_bias, s.hidden,
                              s.width, "linear2_weight");
  s.norm1 = operands.norm(in.norm1_weight, in.norm1_bias, eps1, s.width, "norm1");
  s.norm2 = operands.norm(in.norm2_weight, in.norm2_bias, eps2, s.width, "norm2");
  const auto x = operands.matrix(tokens);
  s.x = x.data, s.x_row = x.stride;
}

std::tuple<Tensor, Tensor> cross_modal_layer_forward(const CrossModalLayerInputs& in) {
  check_sequence(in.visual, in.visual, "visual");
  check_sequence(in.text, in.visual, "text");
  LayerOperands operands(in.visual);
  bool out_of_memory = false;
  ff::CrossModalLayer p{};
  p.type = operands.type;
  p.norm_first = in.norm_first;
  p.activation = activation_of(in.activation);
  int64_t inner = 0;
  describe_stream(p.streams[0], operands, in.visual, in.visual_weights, in.visual_scales,
                  in.visual_norm1_eps, in.visual_norm2_eps, &inner);
  describe_stream(p.streams[1], operands, in.text, in.text_weights, in.text_scales,
                  in.text_norm1_eps, in.text_norm2_eps, &inner);
  ff::BidirectionalForward& attention = p.attention;
  attention.batch = in.visual.size(0);
  attention.q_len = in.visual.size(1), attention.kv_len = in.text.size(1);
  describe_heads(attention, type_of_products(p.type, {p.streams[0].in_proj, p.streams[1].in_proj}),
                 in.num_heads, inner);
  attention.query_value_dim = attention.head_dim;
  describe_masks(attention, in.visual, in.attn_mask, in.text_padding_mask);
  if (in.visual_padding_mask) {
    const Tensor& mask = *in.visual_padding_mask;
    attention.query_padding = padding_data(mask, attention.batch, attention.q_len, in.visual);
    attention.query_padding_batch = mask.stride(0);
    attention.query_padding_column = mask.stride(1);
  }
  describe_scale(attention, std::nullopt);
  const auto made = [&](const ff::FusionStream& s) {
    const int64_t sizes[] = {attention.batch, s.length, s.width};
    return empty_contiguous(3, sizes, kind_of(in.visual));
  };
  const Tensor visual = made(p.streams[0]), text = made(p.streams[1]);
  if (visual.numel() == 0 && text.numel() == 0) return {visual, text};
  p.streams[0].out = visual.mutable_data_ptr(), p.streams[1].out = text.mutable_data_ptr();
  attention.out_of_memory = &out_of_memory;
  ff::kernels().cross_modal_layer(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return {visual, text};
}

constexpr Op kOps[] = {op<cross_attention_layer_forward>("cross_attention_layer_forward"),
                       op<cross_modal_layer_forward>("cross_modal_layer_forward")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
