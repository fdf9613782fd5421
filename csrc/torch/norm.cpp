// norm as a torch op.

#include "layers.h"

namespace {

Tensor norm_forward(const NormInputs& in) {
  LayerOperands operands(in.input);
  const int64_t dims = in.input.dim();
  const std::vector<int64_t> sizes(in.input.sizes().begin(), in.input.sizes().end());
  ff::NormRows p;
  p.width = sizes.back(), p.type = operands.type;
  p.norm = operands.norm(in.weight, in.bias, in.eps, p.width, "weight or bias");
  p.norm.rms = in.rms;
  if (in.residual) {
    const auto residual = operands.residual(*in.residual, sizes.data(), dims);
    p.residual = residual.data, p.residual_row = residual.stride;
  }
  const Tensor out = empty_contiguous(dims, sizes.data(), kind_of(in.input));
  if (out.numel() == 0) return out;
  const auto x = operands.matrix(in.input);
  p.rows = x.rows, p.x = x.data, p.x_row = x.stride;
  p.out = out.mutable_data_ptr(), p.out_row = p.width;
  ff::kernels().norm(p, parallel_for);
  return out;
}

constexpr Op kOps[] = {op<norm_forward>("norm_forward")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
