// encoder_layer as a torch op.

#include "layers.h"

namespace {

// Self-attention of the heads of `in`.
ff::AttentionForward self_attention(const EncoderLayerInputs& in, ff::Type type, int64_t width) {
  ff::AttentionForward p{};
  describe_heads(p, type, in.num_heads, width);
  p.batch = in.input.size(0), p.q_len = p.kv_len = in.input.size(1);
  p.right = in.is_causal ? 0 : ff::kEndless;
  describe_scale(p, std::nullopt);
  describe_masks(p, in.input, in.attn_mask, in.key_padding_mask);
  return p;
}

// Where the sequences of the one entry begin, and where the last one ends, which is that of all
// rows; nothing without `cu_seqlens`.
std::vector<int64_t> sequences_of(const EncoderLayerInputs& in) {
  if (!in.cu_seqlens) return {};
  check_fits(in.input.size(0) == 1 && !in.attn_mask && !in.key_padding_mask,
             "input, attn_mask or key_padding_mask beside cu_seqlens");
  const int64_t rows = in.input.size(1);
  std::vector<int64_t> offsets = offsets_of(*in.cu_seqlens, rows, rows);
  check_fits(offsets.back() == rows, "cu_seqlens");
  return offsets;
}

Tensor encoder_layer_forward(const EncoderLayerInputs& in) {
  check_fits(in.input.dim() == 3 && in.input.size(2) > 0, "input");
  LayerOperands operands(in.input);
  const int64_t width = in.input.size(2);
  const std::vector<int64_t> offsets = sequences_of(in);
  bool out_of_memory = false;
  ff::EncoderLayer p;
  p.type = operands.type, p.width = width;
  p.norm_first = in.norm_first, p.activation = activation_of(in.activation);
  p.in_proj = operands.projections({in.in_proj_weight, in.in_proj_scale, in.in_proj_bias},
                                   {in.k_proj_weight, in.k_proj_scale, in.k_proj_bias},
                                   {in.v_proj_weight, in.v_proj_scale, in.v_proj_bias}, width);
  p.attention = self_attention(in, type_of_products(p.type, p.in_proj), width);
  p.out_proj = operands.weight(in.out_proj_weight, in.out_proj_scale, in.out_proj_bias, width,
                               width, "out_proj_weight or its bias");
  p.linear1 = operands.weight(in.linear1_weight, in.linear1_scale, in.linear1_bias, width,
                              &p.hidden, "linear1_weight or its bias");
  check_fits(p.hidden > 0, "linear1_weight");
  p.linear2 = operands.weight(in.linear2_weight, in.linear2_scale, in.linear2_bias, p.hidden, width,
                              "linear2_weight or its bias");
  p.norm1 = operands.norm(in.norm1_weight, in.norm1_bias, in.norm1_eps, width, "norm1");
  p.norm2 = operands.norm(in.norm2_weight, in.norm2_bias, in.norm2_eps, width, "norm2");

  if (in.cu_seqlens) p.packed = {offsets.data(), int64_t(offsets.size()) - 1};
  const int64_t sizes[] = {in.input.size(0), in.input.size(1), width};
  const Tensor out = empty_contiguous(3, sizes, kind_of(in.input));
  if (out.numel() == 0) return out;
  const auto x = operands.matrix(in.input);
  STD_TORCH_CHECK(x.rows <= INT32_MAX, "fastfusion: too long");
  p.x = x.data, p.x_row = x.stride;
  p.out = out.mutable_data_ptr();
  p.attention.out_of_memory = &out_of_memory;
  ff::kernels().encoder_layer(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return out;
}

constexpr Op kOps[] = {op<encoder_layer_forward>("encoder_layer_forward")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
