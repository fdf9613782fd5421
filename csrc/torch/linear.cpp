// linear as a torch op.

#include "layers.h"

namespace {

Tensor linear_forward(const LinearInputs& in) {
  LayerOperands operands(in.input);
  const int64_t dims = in.input.dim();
  bool out_of_memory = false;
  ff::Linear p;
  p.type = operands.type, p.width = in.input.size(dims - 1);
  p.weight =
      operands.weight(in.weight, in.weight_scale, in.bias, p.width, &p.features, "weight or bias");
  p.activation = activation_of(in.activation);
  std::vector<int64_t> sizes(in.input.sizes().begin(), in.input.sizes().end());
  sizes.back() = p.features;
  if (in.residual) {
    const auto residual = operands.residual(*in.residual, sizes.data(), dims);
    p.residual = residual.data, p.residual_row = residual.stride;
  }
  const Tensor out = empty_contiguous(dims, sizes.data(), kind_of(in.input));
  if (out.numel() == 0) return out;
  const auto x = operands.matrix(in.input);
  STD_TORCH_CHECK(x.rows <= INT32_MAX, "fastfusion: too long");
  p.rows = x.rows, p.length = dims > 1 ? in.input.size(dims - 2) : 1;
  p.x = x.data, p.x_row = x.stride;
  p.out = out.mutable_data_ptr(), p.out_row = p.features;
  p.out_of_memory = &out_of_memory;
  ff::kernels().linear(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return out;
}

constexpr Op kOps[] = {op<linear_forward>("linear_forward")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
