// The CUDA kernels as torch ops: a library of its own, which needs a CUDA build of torch.

#include "cuda_calls.h"

#include <list>

namespace {

// Operands whose last stride is 1, and others in one piece; copies of those that lie in another way
// are kept for the call.
class Straight {
 public:
  ff::View operator()(const Tensor& t) {
    const bool copied = t.size(3) > 1 && t.stride(3) != 1;
    return view(copied ? copies_.emplace_back(torch::stable::contiguous(t)) : t);
  }
  const void* in_one_piece(const Tensor& t) {
    const Tensor& whole =
        t.is_contiguous() ? t : copies_.emplace_back(torch::stable::contiguous(t));
    return whole.const_data_ptr();
  }

 private:
  std::list<Tensor> copies_;
};

template <class Inputs>
void check_dropout(const Inputs& in) {
  STD_TORCH_CHECK(in.dropout_p == 0.0, "fastfusion: the CUDA kernels have no dropout");
}

// ---- scaled_dot_product_attention

struct Attention {
  const Tensor& query;
  Device device;
  Straight straight;
  cuda::Float8Forward p;
  bool float8;
  int capability;

  explicit Attention(const AttentionInputs& in)
      : query(in.query), device(query), float8(is_float8(in.key, query)) {
    check_dropout(in);
    describe(p, in, float8);
    describe_positions(in);
    p.query = straight(in.query), p.key = straight(in.key), p.value = straight(in.value);
    capability = check_kernels(p);
    if (!float8) return;
    STD_TORCH_CHECK(cuda::runs_float8(p.type, capability),
                    "fastfusion: keys of 8 bits need queries of 16 and compute capability 8.9");
    p.key_scales = scales(in.key_scale), p.value_scales = scales(in.value_scale);
  }

  // What `use` makes of the call, which is one of two kinds.
  template <class Use>
  auto with_call(const Use& use) const {
    return float8 ? use(p) : use(static_cast<const ff::AttentionForward&>(p));
  }

  void describe_positions(const AttentionInputs& in) {
    p.table = {};
    if (!position_index(p, in)) return;
    const Tensor &table = *in.position_table, &index = *in.position_index;
    // The parameter of Swin and BEiT is (entries, heads).
    const bool turned = table.stride(0) == 1 && table.stride(1) == p.heads;
    const void* data = turned ? table.const_data_ptr() : straight.in_one_piece(table);
    p.table = {static_cast<const float*>(data),
               static_cast<const int64_t*>(straight.in_one_piece(index)), int32_t(table.size(1)),
               turned, index.dim() == 1};
  }

  Tensor run(Tensor* lse) {
    Tensor out = make_out(p, query, lse);
    with_call([&](const auto& call) {
      const Workspace workspace(cuda::attention_workspace(call, capability), query);
      check_launch(cuda::attention_forward(call, workspace.data, device.stream()));
    });
    return out;
  }

  const char* path() const {
    return with_call([&](const auto& call) { return cuda::attention_path(call, capability); });
  }

 private:
  ff::Slopes scales(const MaybeTensor& given) const {
    if (!given) return {};
    STD_TORCH_CHECK(given->dim() == 2 && given->size(0) == p.batch &&
                        given->size(1) == p.kv_heads && is_here(*given, query) &&
                        given->scalar_type() == ScalarType::Float,
                    "fastfusion: scales must be float32 (batch, kv_heads)");
    return {static_cast<const float*>(given->const_data_ptr()), given->stride(0), given->stride(1)};
  }
};

Tensor attention_out(const AttentionInputs& in) { return Attention(in).run(nullptr); }

std::tuple<Tensor, Tensor> attention_forward(const AttentionInputs& in) {
  Tensor lse;
  Tensor out = Attention(in).run(&lse);
  return {out, lse};
}

std::string attention_path(const AttentionInputs& in) { return Attention(in).path(); }

// ---- bidirectional_attention

struct Bidirectional {
  const Tensor& query;
  Device device;
  Straight straight;
  ff::BidirectionalForward p;
  int capability;

  explicit Bidirectional(const BidirectionalInputs& in) : query(in.query), device(query) {
    check_dropout(in);
    describe(p, in);
    STD_TORCH_CHECK(p.query_value_dim <= kMaxDim, "fastfusion: head dims above ", kMaxDim,
                    " have no CUDA kernel");
    p.query = straight(in.query), p.key = straight(in.key), p.value = straight(in.value);
    p.query_value = straight(in.query_value);
    p.query_value.column = 1;
    capability = check_kernels(p);
  }

  Outputs run(bool lse) {
    const Outputs made = make_outputs(p, query, lse);
    const Workspace workspace(cuda::bidirectional_workspace(p, capability), query);
    check_launch(cuda::bidirectional_forward(p, workspace.data, device.stream()));
    return made;
  }
};

std::tuple<Tensor, Tensor> bidirectional_out(const BidirectionalInputs& in) {
  const Outputs made = Bidirectional(in).run(false);
  return {made.out_q, made.out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bidirectional_forward(const BidirectionalInputs& in) {
  const Outputs made = Bidirectional(in).run(true);
  return {made.out_q, made.out_k, made.lse_q, made.lse_k};
}

std::string bidirectional_path(const BidirectionalInputs& in) {
  const Bidirectional call(in);
  return cuda::bidirectional_path(call.p, call.capability);
}

// Compute capability of a device as the kernels see it, 80 for 8.0; 0 where they find no driver
// that is new enough.
int64_t capability(int64_t device) {
  const Device guard{int32_t(device)};
  return cuda::current_capability();
}

constexpr Op kOps[] = {
    op<attention_forward>("cuda_attention_forward"),
    op<attention_out>("cuda_attention_out"),
    op<attention_path>("cuda_attention_path"),
    op<bidirectional_forward>("cuda_bidirectional_forward"),
    op<bidirectional_out>("cuda_bidirectional_out"),
    op<bidirectional_path>("cuda_bidirectional_path"),
};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) {
  define(m, kOps);
  m.def("cuda_capability(int device) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion, FF_DEVICE_KEY, m) { implement(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CompositeExplicitAutograd, m) {
  m.impl("cuda_capability", TORCH_BOX(&capability));
}

}  // namespace
