// scaled_dot_product_attention as torch ops.

#include "cpu/position_table.h"
#include "cpu_calls.h"

namespace {

// The position table of a call, as it was given and checked.
ff::PositionHeads describe_positions(const ff::Attention& p, const AttentionInputs& in) {
  ff::PositionTable table;
  const int64_t* data = position_index(p, in);
  if (in.position_table) {
    const Tensor &numbers = *in.position_table, &index = *in.position_index;
    table.data = static_cast<const float*>(numbers.const_data_ptr());
    table.entries = numbers.size(1), table.head = numbers.stride(0);
    table.entry = numbers.stride(1);
    table.by_offset = index.dim() == 1;
    if (table.by_offset)
      table.index = {data, 0, index.stride(0)};
    else
      table.index = {data, index.stride(0), index.stride(1)};
  }
  ff::PositionHeads heads(p, table);
  STD_TORCH_CHECK(heads.is_legal(), "fastfusion: position_index must be from 0 to ",
                  table.entries - 1, ", the entries of position_table");
  return heads;
}

Tensor forward(const AttentionInputs& in, Tensor* lse) {
  ff::AttentionForward p;
  describe(p, in);
  const ff::KeyRangeTable ranges = describe_ranges(p);
  ff::PositionHeads positions = describe_positions(p, in);
  Tensor out = make_out(p, in.query, lse);
  run(p, [&] {
    positions.for_parts(p, parallel_for, nullptr, [](const ff::AttentionForward& part) {
      ff::kernels().attention_forward(part, parallel_for);
    });
  });
  return out;
}

Tensor attention_out(const AttentionInputs& in) { return forward(in, nullptr); }

std::tuple<Tensor, Tensor> attention_forward(const AttentionInputs& in) {
  Tensor lse;
  Tensor out = forward(in, &lse);
  return {out, lse};
}

// A tensor of sums, or one without numbers of none.
Tensor as_float32(const std::vector<double>& sums, std::initializer_list<int64_t> sizes,
                  const Tensor& query) {
  const Tensor tensor =
      empty_contiguous(int64_t(sizes.size()), sizes.begin(), float32_beside(query));
  auto* to = static_cast<float*>(tensor.mutable_data_ptr());
  for (size_t i = 0; i < sums.size(); ++i) to[i] = float(sums[i]);
  return tensor;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Gradients<2>& gradients, bool mask_gradient, const AttentionInputs& in) {
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
  ff::PositionHeads positions = describe_positions(p, in);
  const int64_t entries = in.position_table ? in.position_table->size(1) : 0;
  std::vector<double> grad_table(size_t(entries > 0 ? p.heads * entries : 0));
  run(p, [&] {
    positions.for_parts(p, parallel_for, grad_table.data(), [](const ff::AttentionBackward& part) {
      ff::kernels().attention_backward(part, parallel_for);
    });
  });
  const Tensor grad_positions = in.position_table
                                    ? as_float32(grad_table, {p.heads, entries}, in.query)
                                    : as_float32({}, {0}, in.query);
  return {grad_query,         grad_key,       grad_value,
          grad_mask.tensor(), grad_positions, grad_sinks.tensor()};
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
