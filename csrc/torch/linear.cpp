// linear as a torch op.

#include "cpu_calls.h"

namespace {

// A tensor as a matrix of its rows: itself where these are at one stride and their elements side by
// side, else a copy.
struct Matrix {
  Tensor tensor;
  int64_t rows, width, stride;

  explicit Matrix(const Tensor& given) : tensor(given) {
    if (!is_matrix()) tensor = torch::stable::contiguous(given);
    width = tensor.size(given.dim() - 1);
    rows = width > 0 ? tensor.numel() / width : 0;
    stride = tensor.dim() > 1 ? tensor.stride(given.dim() - 2) : width;
    if (rows <= 1) stride = width;  // of one row it may be anything
  }

 private:
  bool is_matrix() const {
    const int64_t dims = tensor.dim();
    if (tensor.size(dims - 1) > 1 && tensor.stride(dims - 1) != 1) return false;
    for (int64_t i = dims - 2; i > 0; --i)
      if (tensor.size(i - 1) > 1 && tensor.stride(i - 1) != tensor.stride(i) * tensor.size(i))
        return false;
    return true;
  }
};

Tensor linear_forward(const LinearInputs& in) {
  const auto is_like_input = [&](const Tensor& t) {
    return t.is_cpu() && t.scalar_type() == in.input.scalar_type();
  };
  check_fits(in.input.is_cpu() && in.input.dim() > 0, "input");
  check_fits(is_like_input(in.weight) && in.weight.dim() == 2 &&
                 in.weight.size(1) == in.input.size(in.input.dim() - 1) && in.weight.size(1) > 0,
             "weight");
  const int64_t features = in.weight.size(0), dims = in.input.dim();
  if (in.bias)
    check_fits(is_like_input(*in.bias) && in.bias->dim() == 1 && in.bias->size(0) == features,
               "bias");
  check_fits(in.activation >= 0 && in.activation <= int64_t(ff::Activation::kSilu), "activation");
  std::vector<int64_t> sizes(in.input.sizes().begin(), in.input.sizes().end());
  sizes.back() = features;
  if (in.residual) {
    check_fits(is_like_input(*in.residual) && in.residual->dim() == dims, "residual");
    for (int64_t i = 0; i < dims; ++i)
      check_fits(in.residual->size(i) == sizes[size_t(i)], "residual");
  }
  const Tensor out = empty_contiguous(dims, sizes.data(), kind_of(in.input));
  if (out.numel() == 0) return out;
  const Matrix x(in.input), weight(in.weight), residual(in.residual ? *in.residual : out);
  const Tensor bias = in.bias ? torch::stable::contiguous(*in.bias) : out;
  STD_TORCH_CHECK(x.rows <= INT32_MAX && features <= INT32_MAX, "fastfusion: too long");
  bool out_of_memory = false;
  ff::Linear p;
  p.rows = x.rows, p.length = dims > 1 ? in.input.size(dims - 2) : 1;
  p.width = x.width, p.features = features;
  p.type = kernel_type(in.input.scalar_type());
  check_fits(p.type != ff::Type::kBool, "input");
  p.x = x.tensor.const_data_ptr(), p.x_row = x.stride;
  p.weight = weight.tensor.const_data_ptr(), p.weight_row = weight.stride;
  if (in.bias) p.bias = bias.const_data_ptr();
  p.activation = ff::Activation(in.activation);
  if (in.residual) p.residual = residual.tensor.const_data_ptr(), p.residual_row = residual.stride;
  p.out = out.mutable_data_ptr(), p.out_row = features;
  p.out_of_memory = &out_of_memory;
  ff::kernels().linear(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return out;
}

constexpr Op kOps[] = {op<linear_forward>("linear_forward")};

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion, m) { define(m, kOps); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) { implement(m, kOps); }

}  // namespace
