// The CUDA kernels as torch ops: a library of its own, which needs a CUDA build of torch.

#include "torch_cuda.h"

#include <string>

namespace {

// An operand whose last stride is 1.
Tensor straight(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "fastfusion: query, key and value must be 4-D");
  return t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
}

// ---- scaled_dot_product_attention

struct Attention {
  Device device;
  Tensor query, key, value;
  ff::AttentionForward p;
  int capability;

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& mask,
            const MaybeTensor& padding, bool is_causal, bool bottom_right,
            std::optional<double> scale, bool enable_gqa)
      : device(q), query(straight(q)), key(straight(k)), value(straight(v)) {
    describe(p, query, key, value, mask, padding, std::nullopt, 0.0, is_causal, bottom_right,
             scale);
    STD_TORCH_CHECK(enable_gqa || p.heads == p.kv_heads || p.kv_heads == 1,
                    "fastfusion: more query heads than key heads need enable_gqa");
    capability = check_kernels(p);
  }

  Tensor run(Tensor* lse) {
    Tensor out = empty_rows_outside(p.batch, p.heads, p.q_len, p.value_dim, kind_of(query));
    p.out = mutable_view(out);
    if (lse) {
      const int64_t sizes[] = {p.batch, p.heads, p.q_len};
      *lse = empty_contiguous(3, sizes, float32_beside(query));
      p.lse = mutable_lse(*lse);
    }
    const Workspace workspace(cuda::attention_workspace(p, capability), query);
    check_launch(cuda::attention_forward(p, workspace.data, device.stream()));
    return out;
  }
};

Tensor attention_out(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                     MaybeTensor padding, bool is_causal, bool bottom_right,
                     std::optional<double> scale, bool enable_gqa) {
  return Attention(query, key, value, mask, padding, is_causal, bottom_right, scale, enable_gqa)
      .run(nullptr);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key,
                                             const Tensor& value, MaybeTensor mask,
                                             MaybeTensor padding, bool is_causal, bool bottom_right,
                                             std::optional<double> scale, bool enable_gqa) {
  Tensor lse;
  Tensor out =
      Attention(query, key, value, mask, padding, is_causal, bottom_right, scale, enable_gqa)
          .run(&lse);
  return {out, lse};
}

std::string attention_path(const Tensor& query, const Tensor& key, const Tensor& value,
                           MaybeTensor mask, MaybeTensor padding, bool is_causal, bool bottom_right,
                           std::optional<double> scale, bool enable_gqa) {
  const Attention call(query, key, value, mask, padding, is_causal, bottom_right, scale,
                       enable_gqa);
  return cuda::attention_path(call.p, call.capability);
}

// ---- bidirectional_attention

struct Bidirectional {
  Device device;
  Tensor query, key, value, query_value;
  ff::BidirectionalForward p;
  int capability;

  Bidirectional(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w,
                const MaybeTensor& mask, const MaybeTensor& query_padding,
                const MaybeTensor& key_padding, bool is_causal, bool bottom_right,
                std::optional<double> scale)
      : device(q),
        query(straight(q)),
        key(straight(k)),
        value(straight(v)),
        query_value(straight(w)) {
    describe(p, query, key, value, query_value, mask, query_padding, key_padding, std::nullopt, 0.0,
             is_causal, bottom_right, scale);
    STD_TORCH_CHECK(p.query_value_dim <= kMaxDim, "fastfusion: head dims above ", kMaxDim,
                    " have no CUDA kernel");
    p.query_value.column = 1;
    capability = check_kernels(p);
  }

  Results run(bool lse) {
    const Results r = make_results(p, query, lse);
    const Workspace workspace(cuda::bidirectional_workspace(p, capability), query);
    check_launch(cuda::bidirectional_forward(p, workspace.data, device.stream()));
    return r;
  }
};

std::tuple<Tensor, Tensor> bidirectional_out(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const Tensor& query_value,
                                             MaybeTensor mask, MaybeTensor query_padding,
                                             MaybeTensor key_padding, bool is_causal,
                                             bool bottom_right, std::optional<double> scale) {
  const Results r = Bidirectional(query, key, value, query_value, mask, query_padding, key_padding,
                                  is_causal, bottom_right, scale)
                        .run(false);
  return {r.out_q, r.out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& query_value,
    MaybeTensor mask, MaybeTensor query_padding, MaybeTensor key_padding, bool is_causal,
    bool bottom_right, std::optional<double> scale) {
  const Results r = Bidirectional(query, key, value, query_value, mask, query_padding, key_padding,
                                  is_causal, bottom_right, scale)
                        .run(true);
  return {r.out_q, r.out_k, r.lse_q, r.lse_k};
}

std::string bidirectional_path(const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& query_value, MaybeTensor mask,
                               MaybeTensor query_padding, MaybeTensor key_padding, bool is_causal,
                               bool bottom_right, std::optional<double> scale) {
  const Bidirectional call(query, key, value, query_value, mask, query_padding, key_padding,
                           is_causal, bottom_right, scale);
  return cuda::bidirectional_path(call.p, call.capability);
}

// Compute capability of a device as the kernels see it, 80 for 8.0; 0 where they find no driver
// that is new enough.
int64_t capability(int64_t device) {
  const Device guard{int32_t(device)};
  return cuda::current_capability();
}

#define FF_ATTENTION                                                                       \
  "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, " \
  "bool is_causal, bool bottom_right, float? scale, bool enable_gqa)"
#define FF_BIDIRECTIONAL                                                                      \
  "(Tensor query, Tensor key, Tensor value, Tensor query_value, Tensor? attn_mask, "          \
  "Tensor? query_padding_mask, Tensor? key_padding_mask, bool is_causal, bool bottom_right, " \
  "float? scale)"

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) {
  m.def("cuda_attention_forward" FF_ATTENTION " -> (Tensor, Tensor)");
  m.def("cuda_attention_out" FF_ATTENTION " -> Tensor");
  m.def("cuda_attention_path" FF_ATTENTION " -> str");
  m.def("cuda_bidirectional_forward" FF_BIDIRECTIONAL " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_bidirectional_out" FF_BIDIRECTIONAL " -> (Tensor, Tensor)");
  m.def("cuda_bidirectional_path" FF_BIDIRECTIONAL " -> str");
  m.def("cuda_capability(int device) -> int");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cuda_attention_forward", TORCH_BOX(&attention_forward));
  m.impl("cuda_attention_out", TORCH_BOX(&attention_out));
  m.impl("cuda_attention_path", TORCH_BOX(&attention_path));
  m.impl("cuda_bidirectional_forward", TORCH_BOX(&bidirectional_forward));
  m.impl("cuda_bidirectional_out", TORCH_BOX(&bidirectional_out));
  m.impl("cuda_bidirectional_path", TORCH_BOX(&bidirectional_path));
}

#ifdef FF_TORCH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastfusion, CUDA, m) { implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m); }
#endif

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CompositeExplicitAutograd, m) {
  m.impl("cuda_capability", TORCH_BOX(&capability));
}

}  // namespace
