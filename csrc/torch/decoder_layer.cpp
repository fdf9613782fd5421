// decoder_layer as torch ops: one that writes to a cache, and one without, since in graphs an op
// that writes means more.

#include "layers.h"

namespace {

// Where the keys or values of x go, behind those of the tokens before.
ff::MutableView cache_view(const Tensor& cache, const ff::Attention& p, const char* name) {
  check_fits(cache.dim() == 4 && cache.size(2) >= p.kv_len, name);
  check_heads(cache, p, cache.size(2), name);
  for (int64_t i = 0; i < 4; ++i) check_fits(cache.size(i) < 2 || cache.stride(i) != 0, name);
  return mutable_view(cache);
}

template <class Inputs>
void describe_memory(ff::DecoderLayer& p, LayerOperands& operands, const Inputs& in) {
  p.has_memory = in.memory || in.memory_key;
  if (!p.has_memory) {
    check_fits(!in.memory_value && !in.memory_mask && !in.memory_padding_mask, "memory");
    return;
  }
  ff::CrossAttentionLayer& cross = p.to_memory;
  ff::AttentionForward& attention = cross.attention;
  cross.type = operands.type;
  describe_heads(attention, operands.type, in.num_heads, p.width);
  attention.batch = p.attention.batch, attention.q_len = p.attention.q_len;
  check_fits(in.cross_q_weight && in.cross_out_weight, "cross_q_weight or cross_out_weight");
  const auto weight = [&](const MaybeProjection& given, int64_t width, const char* name) {
    return operands.maybe_weight(given, width, p.width, name);
  };
  cross.q_proj = weight({in.cross_q_weight, in.cross_q_scale, in.cross_q_bias}, p.width,
                        "cross_q_weight or its bias");
  cross.out_proj = weight({in.cross_out_weight, in.cross_out_scale, in.cross_out_bias}, p.width,
                          "cross_out_weight or its bias");
  if (in.memory) {
    const Tensor& memory = *in.memory;
    check_fits(memory.is_cpu() && memory.dim() == 3 && memory.size(0) == attention.batch &&
                   memory.size(2) > 0 && memory.scalar_type() == in.input.scalar_type() &&
                   !in.memory_key && !in.memory_value,
               "memory");
    check_fits(in.cross_k_weight && in.cross_v_weight, "cross_k_weight or cross_v_weight");
    cross.context_dim = memory.size(2), attention.kv_len = memory.size(1);
    cross.kv_proj.count = 2;
    cross.kv_proj.each[0] = weight({in.cross_k_weight, in.cross_k_scale, in.cross_k_bias},
                                   cross.context_dim, "cross_k_weight or its bias");
    cross.kv_proj.each[1] = weight({in.cross_v_weight, in.cross_v_scale, in.cross_v_bias},
                                   cross.context_dim, "cross_v_weight or its bias");
    const ff::Weight* kv = cross.kv_proj.each;
    attention.type = type_of_products(p.type, {cross.q_proj, kv[0], kv[1]});
    const auto context = operands.matrix(memory);
    cross.context = context.data, cross.context_row = context.stride;
  } else {
    check_fits(
        in.memory_value && !in.cross_k_weight && !in.cross_v_weight && in.memory_key->dim() == 4,
        "memory_key");
    attention.kv_len = in.memory_key->size(2);
    attention.type = type_of_keys(*in.memory_key, p.type);
    for (const MaybeTensor* t : {&in.memory_key, &in.memory_value})
      check_heads(**t, attention, attention.kv_len, "memory_key or memory_value");
    attention.key = view(*in.memory_key), attention.value = view(*in.memory_value);
  }
  STD_TORCH_CHECK(attention.kv_len <= INT32_MAX, "fastfusion: too long");
  describe_masks(attention, in.input, in.memory_mask, in.memory_padding_mask);
  describe_scale(attention, std::nullopt);
}

template <bool kWrites>
Tensor decoder_layer(const DecoderLayerInputs<kWrites>& in) {
  check_fits(in.input.dim() == 3 && in.input.size(2) > 0, "input");
  check_fits(bool(in.key_cache) == kWrites && bool(in.value_cache) == kWrites, "key_cache");
  LayerOperands operands(in.input);
  const int64_t width = in.input.size(2);
  bool out_of_memory = false;
  ff::DecoderLayer p{};
  p.type = operands.type, p.width = width;
  p.norm_first = in.norm_first, p.activation = activation_of(in.activation);
  p.in_proj = operands.projections({in.self_q_weight, in.self_q_scale, in.self_q_bias},
                                   {in.self_k_weight, in.self_k_scale, in.self_k_bias},
                                   {in.self_v_weight, in.self_v_scale, in.self_v_bias}, width);
  ff::AttentionForward& attention = p.attention;
  const ff::Type type =
      kWrites ? type_of_keys(*in.key_cache, p.type) : type_of_products(p.type, p.in_proj);
  describe_heads(attention, type, in.num_heads, width);
  attention.batch = in.input.size(0), attention.q_len = in.input.size(1);
  check_fits(in.past_length >= 0 && in.past_length <= INT32_MAX && (kWrites || !in.past_length),
             "past_length");
  p.past = in.past_length;
  attention.kv_len = p.past + attention.q_len;
  STD_TORCH_CHECK(attention.kv_len <= INT32_MAX, "fastfusion: too long");
  attention.right = in.is_causal ? 0 : ff::kEndless, attention.diagonal = p.past;
  describe_scale(attention, std::nullopt);
  describe_masks(attention, in.input, in.attn_mask, in.key_padding_mask);
  if (kWrites) {
    p.key_cache = cache_view(*in.key_cache, attention, "key_cache");
    p.value_cache = cache_view(*in.value_cache, attention, "value_cache");
  }
  p.out_proj = operands.weight(in.self_out_weight, in.self_out_scale, in.self_out_bias, width,
                               width, "self_out_weight or its bias");
  describe_memory(p, operands, in);
  p.linear1 = operands.weight(in.linear1_weight, in.linear1_scale, in.linear1_bias, width,
                              &p.hidden, "linear1_weight or its bias");
  check_fits(p.hidden > 0, "linear1_weight");
  p.linear2 = operands.weight(in.linear2_weight, in.linear2_scale, in.linear2_bias, p.hidden, width,
                              "linear2_weight or its bias");
  p.norm1 = operands.norm(in.norm1_weight, in.norm1_bias, in.norm1_eps, width, "norm1");
  p.norm2 = operands.norm(in.norm2_weight, in.norm2_bias, in.norm2_eps, width, "norm2");
  p.norm3 = operands.norm(in.norm3_weight, in.norm3_bias, in.norm3_eps, width, "norm3");

  const int64_t sizes[] = {attention.batch, attention.q_len, width};
  const Tensor out = empty_contiguous(3, sizes, kind_of(in.input));
  if (out.numel() == 0) return out;
  const auto x = operands.matrix(in.input);
  STD_TORCH_CHECK(x.rows <= INT32_MAX, "fastfusion: too long");
  p.x = x.data, p.x_row = x.stride;
  p.out = out.mutable_data_ptr();
  attention.out_of_memory = p.to_memory.attention.out_of_memory = &out_of_memory;
  ff::kernels().decoder_layer(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return out;
}

constexpr Op kOps[] = {op<decoder_layer<false>>("decoder_layer_forward"),
                       op<decoder_layer<true>>("decoder_layer_cached")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
