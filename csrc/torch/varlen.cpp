// varlen_attention as torch ops.

#include "cpu_calls.h"

namespace {

// A packed (rows, heads, dim) tensor as one batch entry.
template <class View, class Data>
View packed(const Tensor& t, Data data) {
  return {data, 0, t.stride(1), t.stride(0), t.stride(2)};
}

ff::View packed_view(const Tensor& t) { return packed<ff::View>(t, t.const_data_ptr()); }

ff::MutableView packed_output(const Tensor& t) {
  return packed<ff::MutableView>(t, t.mutable_data_ptr());
}

struct Packing {
  std::vector<int64_t> q, kv;
  int64_t max_q, max_k;
  bool bottom_right;
  ff::Prefixes prefixes = {};

  int64_t count() const { return int64_t(q.size()) - 1; }
  ff::Sequences sequences() const { return {count(), q.data(), kv.data(), bottom_right, prefixes}; }

  // (sequences, heads, max_q, max_k), what a mask broadcasts to.
  struct Scores {
    int64_t sizes[4];
  };
  Scores scores(int64_t heads) const { return {{count(), heads, max_q, max_k}}; }
};

Packing describe(ff::Attention& p, const VarlenInputs& in) {
  const Tensor &query = in.query, &key = in.key, &value = in.value;
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
                  "fastfusion: query, key and value must be 3-D");
  p.batch = 1, p.heads = query.size(1), p.kv_heads = key.size(1);
  p.q_len = query.size(0), p.kv_len = key.size(0);
  p.head_dim = query.size(2), p.value_dim = value.size(2);
  STD_TORCH_CHECK(
      value.size(0) == p.kv_len && value.size(1) == p.kv_heads && key.size(2) == p.head_dim,
      "fastfusion: the shapes of query, key and value do not fit");
  describe_kind(p, in.query, in.key, in.value);
  p.query = packed_view(query), p.key = packed_view(key), p.value = packed_view(value);
  describe_options(p, in);
  Packing packing{offsets_of(in.cu_seqlens_q, p.q_len, in.max_seqlen_q),
                  offsets_of(in.cu_seqlens_k, p.kv_len, in.max_seqlen_k), in.max_seqlen_q,
                  in.max_seqlen_k, in.bottom_right};
  STD_TORCH_CHECK(packing.q.size() == packing.kv.size(),
                  "fastfusion: cu_seqlens_q and cu_seqlens_k differ in length");
  describe_mask(p, query, in.attn_mask, packing.scores(p.heads).sizes);
  describe_slopes(p, query, in.alibi_slopes, packing.count());
  describe_sinks(p, query, in.sinks);
  STD_TORCH_CHECK(!in.prefix_len || in.is_causal, "fastfusion: prefix_len needs is_causal");
  const int64_t* prefixes = integers(in.prefix_len, {packing.count()}, query, "prefix_len");
  if (prefixes) packing.prefixes = {prefixes, in.prefix_len->stride(0)};
  return packing;
}

// A tensor for `dim` numbers a row and head, 0 in the rows behind the last sequence.
Tensor like(const Tensor& rows, int64_t dim, const std::vector<int64_t>& offsets) {
  const int64_t sizes[] = {rows.size(0), rows.size(1), dim};
  Tensor made = empty_contiguous(3, sizes, kind_of(rows));
  const int64_t used = offsets.back();
  const size_t row = size_t(sizes[1] * sizes[2] * made.element_size());
  set_zeros(static_cast<char*>(made.mutable_data_ptr()) + size_t(used) * row,
            size_t(sizes[0] - used) * row);
  return made;
}

Tensor forward(const VarlenInputs& in, Tensor* lse) {
  ff::AttentionForward p;
  const Packing packing = describe(p, in);
  Tensor out = like(in.query, p.value_dim, packing.q);
  p.out = packed_output(out);
  if (lse) {
    const int64_t sizes[] = {p.q_len, p.heads};
    *lse = empty_contiguous(2, sizes, float32_beside(in.query));
    auto* data = static_cast<float*>(lse->mutable_data_ptr());
    p.lse = {data, 0, lse->stride(1), lse->stride(0)};
    std::fill(data + packing.q.back() * p.heads, data + p.q_len * p.heads, -INFINITY);
  }
  run(p, [&] { ff::varlen_forward(p, packing.sequences(), parallel_for); });
  return out;
}

Tensor varlen_out(const VarlenInputs& in) { return forward(in, nullptr); }

std::tuple<Tensor, Tensor> varlen_forward(const VarlenInputs& in) {
  Tensor lse;
  Tensor out = forward(in, &lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> varlen_backward(const Gradients<2>& gradients,
                                                                   bool mask_gradient,
                                                                   const VarlenInputs& in) {
  ff::AttentionBackward p;
  const Packing packing = describe(p, in);
  const MaybeTensor &grad_out = gradients[0], &grad_lse = gradients[1];
  Tensor grad = like(in.query, p.value_dim, packing.q);
  if (grad_out) {
    STD_TORCH_CHECK(grad_out->dim() == 3 && grad_out->is_cpu() && grad_out->size(0) == p.q_len &&
                        grad_out->size(1) == p.heads && grad_out->size(2) == p.value_dim &&
                        grad_out->scalar_type() == in.query.scalar_type(),
                    "fastfusion: grad_out does not fit");
    grad = *grad_out;
  } else {
    fill_zeros(grad);
  }
  p.grad_out = packed_view(grad);
  if (grad_lse) {
    STD_TORCH_CHECK(grad_lse->dim() == 2 && grad_lse->is_cpu() && grad_lse->size(0) == p.q_len &&
                        grad_lse->size(1) == p.heads &&
                        grad_lse->scalar_type() == ScalarType::Float,
                    "fastfusion: grad_lse does not fit");
    p.grad_lse = {static_cast<const float*>(grad_lse->const_data_ptr()), 0, grad_lse->stride(1),
                  grad_lse->stride(0)};
  }
  Tensor grad_query = like(in.query, p.head_dim, packing.q);
  Tensor grad_key = like(in.key, p.head_dim, packing.kv);
  Tensor grad_value = like(in.value, p.value_dim, packing.kv);
  p.grad_query = packed_output(grad_query), p.grad_key = packed_output(grad_key);
  p.grad_value = packed_output(grad_value);
  MaskGradientTensor grad_mask(p, packing.scores(p.heads).sizes, in.attn_mask, mask_gradient,
                               kind_of(in.query), p.grad_mask);
  const SinkGradient grad_sinks(p, in.sinks, packing.count(), kind_of(in.query));
  run(p, [&] { ff::varlen_backward(p, packing.sequences(), parallel_for); });
  return {grad_query, grad_key, grad_value, grad_mask.tensor(), grad_sinks.tensor()};
}

constexpr Op kOps[] = {
    op<varlen_forward>("varlen"),
    op<varlen_forward>("varlen_forward"),
    op<varlen_forward>("varlen_forward.lengths", 10),
    op<varlen_out>("varlen_out"),
    op<varlen_out>("varlen_out.lengths", 10),
    op<varlen_backward>("varlen_backward"),
    op<varlen_backward>("varlen_backward.lengths", 3 + 10),
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
