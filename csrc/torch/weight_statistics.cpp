// What the weights of attention amount to, as a torch op.

#include "cpu_calls.h"

namespace {

void describe(ff::WeightStatistics& p, const WeightStatisticsInputs& in) {
  STD_TORCH_CHECK(in.query.dim() == 4 && in.key.dim() == 4,
                  "fastfusion: query and key must be 4-D");
  const auto q = in.query.sizes(), k = in.key.sizes();
  p.batch = q[0], p.heads = q[1], p.q_len = q[2], p.head_dim = q[3];
  p.kv_heads = k[1], p.kv_len = k[2], p.value_dim = 0;
  STD_TORCH_CHECK(k[0] == q[0] && k[3] == q[3],
                  "fastfusion: the shapes of query and key do not fit");
  describe_kind(p, in.query, in.key);
  p.query = view(in.query), p.key = view(in.key);
  describe_masks(p, in.query, in.attn_mask, in.key_padding_mask);
  if (in.query_padding_mask) {
    p.query_padding = padding_data(*in.query_padding_mask, p.batch, p.q_len, in.query);
    p.query_padding_batch = in.query_padding_mask->stride(0);
    p.query_padding_column = in.query_padding_mask->stride(1);
  }
  describe_scale(p, in.scale);
  p.diagonal = in.bottom_right ? p.kv_len - p.q_len : 0;
  if (in.is_causal) p.right = 0;
}

// Entropy (B, H, Lq) and mass (B, H, Lk), each empty where it is not asked for.
std::tuple<Tensor, Tensor> weight_statistics_forward(const WeightStatisticsInputs& in) {
  ff::WeightStatistics p;
  describe(p, in);
  const Kind kind = float32_beside(in.query);
  const int64_t queries[] = {p.batch, p.heads, p.q_len}, none[] = {0};
  const int64_t keys[] = {p.batch, p.heads, p.kv_len};
  const Tensor lse = empty_contiguous(3, queries, kind);
  const Tensor entropy =
      in.entropy ? empty_contiguous(3, queries, kind) : empty_contiguous(1, none, kind);
  const Tensor mass =
      in.mass ? fill_zeros(empty_contiguous(3, keys, kind)) : empty_contiguous(1, none, kind);
  p.lse = mutable_lse(lse);
  if (entropy.numel() > 0) p.entropy = mutable_lse(entropy);
  if (mass.numel() > 0) p.mass = mutable_lse(mass);
  if (lse.numel() > 0) run(p, [&] { ff::kernels().weight_statistics(p, parallel_for); });
  return {entropy, mass};
}

constexpr Op kOps[] = {op<weight_statistics_forward>("weight_statistics_forward")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
