// The only file that sees torch: schemas, checks and outputs of the compiled ops, over its stable
// ABI (torch >= 2.11). Every check that memory safety depends on is here, since compiled graphs
// call the ops without Python; the words for a person come from check() of the op's Python file.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr double kTwo32 = 4294967296.0;

ff::Type kernel_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return ff::Type::kFloat32;
    case ScalarType::BFloat16:
      return ff::Type::kBFloat16;
    case ScalarType::Half:
      return ff::Type::kFloat16;
    case ScalarType::Bool:
      return ff::Type::kBool;
    default:
      STD_TORCH_CHECK(false, "fastfusion: this dtype has no CPU kernel");
  }
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// torch::stable::new_empty goes through the dispatcher and costs 0.9 us more.
Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty_contiguous(int64_t dims, const int64_t* sizes, int32_t dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  int64_t stride = 1;
  for (int64_t i = dims; i-- > 0;) {
    strides[size_t(i)] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty(dims, sizes, strides.data(), dtype);
}

// (B, heads, length, dim) in memory (B, length, heads, dim): modules need no copy.
Tensor empty_rows_outside(int64_t batch, int64_t heads, int64_t length, int64_t dim,
                          int32_t dtype) {
  const auto size = [](int64_t n) { return n > 0 ? n : int64_t{1}; };
  const int64_t row = size(heads) * size(dim);
  const int64_t sizes[] = {batch, heads, length, dim};
  const int64_t strides[] = {size(length) * row, size(dim), row, 1};
  return empty(4, sizes, strides, dtype);
}

ff::View view(const Tensor& t) {
  const auto strides = t.strides();
  return {t.const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

ff::MutableView mutable_view(const Tensor& t) {
  const auto strides = t.strides();
  return {t.mutable_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

// Strides of a tensor that broadcasts to (B, H, Lq, Lk); 0 along what it repeats.
void broadcast_strides(const Tensor& mask, const int64_t (&target)[4], int64_t (&strides)[4]) {
  const int64_t missing = 4 - mask.dim();
  STD_TORCH_CHECK(missing >= 0, "fastfusion: attn_mask has more than 4 dimensions");
  const auto sizes = mask.sizes();
  const auto given = mask.strides();
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t size = i < missing ? 1 : sizes[i - missing];
    STD_TORCH_CHECK(size == target[i] || size == 1, "fastfusion: attn_mask does not broadcast");
    strides[i] = size == 1 ? 0 : given[i - missing];
  }
}

void parallel_for(int64_t tasks, void (*body)(int64_t, int64_t, const void*), const void* context) {
  torch::stable::parallel_for(0, tasks, 1,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

void describe(ff::Attention& p, const Tensor& query, const Tensor& key, const Tensor& value,
              const MaybeTensor& mask, const MaybeTensor& padding, const MaybeTensor& seed,
              double dropout_p, int64_t dropout_stream, bool is_causal,
              std::optional<double> scale) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "fastfusion: query, key and value must be 4-D");
  const auto q = query.sizes(), k = key.sizes(), v = value.sizes();
  p.batch = q[0], p.heads = q[1], p.q_len = q[2], p.head_dim = q[3];
  p.kv_heads = k[1], p.kv_len = k[2], p.value_dim = v[3];
  const bool grouped = p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0;
  STD_TORCH_CHECK(k[0] == q[0] && v[0] == q[0] && v[1] == k[1] && v[2] == k[2] && k[3] == q[3] &&
                      p.head_dim > 0 && grouped,
                  "fastfusion: the shapes of query, key and value do not fit");
  STD_TORCH_CHECK(p.kv_len <= INT32_MAX && p.q_len <= INT32_MAX, "fastfusion: too long");
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type && key.is_cpu() &&
                      value.is_cpu() && query.is_cpu() && type != ScalarType::Bool,
                  "fastfusion: dtypes or devices differ");
  p.type = kernel_type(type);
  p.query = view(query), p.key = view(key), p.value = view(value);

  if (mask) {
    STD_TORCH_CHECK(mask->is_cpu(), "fastfusion: attn_mask is on another device");
    const ScalarType mask_type = mask->scalar_type();
    STD_TORCH_CHECK(
        mask_type == ScalarType::Bool || mask_type == ScalarType::Float || mask_type == type,
        "fastfusion: attn_mask has the wrong dtype");
    int64_t strides[4];
    broadcast_strides(*mask, {p.batch, p.heads, p.q_len, p.kv_len}, strides);
    p.mask = {mask->const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
    p.mask_type = kernel_type(mask_type);
  }
  if (padding) {
    STD_TORCH_CHECK(padding->dim() == 2 && padding->scalar_type() == ScalarType::Bool &&
                        padding->size(0) == p.batch && padding->size(1) == p.kv_len &&
                        padding->is_cpu(),
                    "fastfusion: key_padding_mask does not fit");
    p.padding = static_cast<const bool*>(padding->const_data_ptr());
    p.padding_batch = padding->stride(0), p.padding_column = padding->stride(1);
  }
  p.scale = float(scale ? *scale : 1.0 / std::sqrt(double(p.head_dim)));
  STD_TORCH_CHECK(std::isfinite(p.scale), "fastfusion: scale must be finite");
  p.causal = is_causal;
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0 && (dropout_p == 0.0 || seed) &&
                      (dropout_stream == 0 || dropout_stream == 1),
                  "fastfusion: dropout_p must be between 0 and 1 and come with a seed");
  if (dropout_p > 0.0) {
    STD_TORCH_CHECK(seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "fastfusion: seed must be one int64");
    p.dropout = true;
    p.dropout_stream = dropout_stream;
    p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    p.threshold = uint64_t(std::nearbyint(dropout_p * kTwo32));
    p.keep_scale = dropout_p < 1.0 ? float(1.0 / (1.0 - dropout_p)) : 0.0f;
  }
}

Tensor forward(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
               const MaybeTensor& padding, const MaybeTensor& seed, double dropout_p,
               int64_t dropout_stream, bool is_causal, std::optional<double> scale, bool enable_gqa,
               Tensor* lse) {
  ff::AttentionForward p;
  describe(p, query, key, value, mask, padding, seed, dropout_p, dropout_stream, is_causal, scale);
  STD_TORCH_CHECK(enable_gqa || p.heads == p.kv_heads || p.kv_heads == 1,
                  "fastfusion: more query heads than key heads need enable_gqa");
  Tensor out = empty_rows_outside(p.batch, p.heads, p.q_len, p.value_dim, dtype_code(query));
  p.out = mutable_view(out);
  if (lse) {
    const int64_t sizes[] = {p.batch, p.heads, p.q_len};
    *lse = empty_contiguous(3, sizes, aoti_torch_dtype_float32());
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  bool out_of_memory = false;
  p.out_of_memory = &out_of_memory;
  ff::kernels().attention_forward(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  return out;
}

Tensor attention_out(const Tensor& query, const Tensor& key, const Tensor& value, MaybeTensor mask,
                     MaybeTensor padding, MaybeTensor seed, double dropout_p,
                     int64_t dropout_stream, bool is_causal, std::optional<double> scale,
                     bool enable_gqa) {
  return forward(query, key, value, mask, padding, seed, dropout_p, dropout_stream, is_causal,
                 scale, enable_gqa, nullptr);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key,
                                             const Tensor& value, MaybeTensor mask,
                                             MaybeTensor padding, MaybeTensor seed,
                                             double dropout_p, int64_t dropout_stream,
                                             bool is_causal, std::optional<double> scale,
                                             bool enable_gqa) {
  Tensor lse;
  Tensor out = forward(query, key, value, mask, padding, seed, dropout_p, dropout_stream, is_causal,
                       scale, enable_gqa, &lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, MaybeTensor grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, MaybeTensor mask, MaybeTensor padding, MaybeTensor seed, double dropout_p,
    int64_t dropout_stream, bool is_causal, std::optional<double> scale, bool mask_gradient) {
  ff::AttentionBackward p;
  describe(p, query, key, value, mask, padding, seed, dropout_p, dropout_stream, is_causal, scale);
  const int64_t expected[4] = {p.batch, p.heads, p.q_len, p.value_dim};
  STD_TORCH_CHECK(
      grad_out.dim() == 4 && grad_out.is_cpu() && grad_out.scalar_type() == query.scalar_type(),
      "fastfusion: grad_out must be like the output");
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(grad_out.size(i) == expected[i], "fastfusion: grad_out does not fit");
  p.grad_out = view(grad_out);
  if (grad_lse) {
    STD_TORCH_CHECK(
        grad_lse->dim() == 3 && grad_lse->is_cpu() && grad_lse->scalar_type() == ScalarType::Float,
        "fastfusion: grad_lse must be float32 and 3-D");
    for (int i = 0; i < 3; ++i)
      STD_TORCH_CHECK(grad_lse->size(i) == expected[i], "fastfusion: grad_lse does not fit");
    p.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
    p.grad_lse_batch = grad_lse->stride(0), p.grad_lse_head = grad_lse->stride(1);
    p.grad_lse_row = grad_lse->stride(2);
  }
  const int32_t dtype = dtype_code(query);
  Tensor grad_query = empty_rows_outside(p.batch, p.heads, p.q_len, p.head_dim, dtype);
  Tensor grad_key = empty_rows_outside(p.batch, p.kv_heads, p.kv_len, p.head_dim, dtype);
  Tensor grad_value = empty_rows_outside(p.batch, p.kv_heads, p.kv_len, p.value_dim, dtype);
  p.grad_query = mutable_view(grad_query), p.grad_key = mutable_view(grad_key);
  p.grad_value = mutable_view(grad_value);

  Tensor grad_mask;
  std::vector<float> full;
  std::vector<double> sums;
  if (mask_gradient && mask && p.mask_type != ff::Type::kBool) {
    const auto sizes = mask->sizes();
    grad_mask = empty_contiguous(mask->dim(), sizes.data(), dtype_code(*mask));
    const auto size = size_t(mask->numel());
    // One element more: an empty vector has no data and would look unwanted.
    if (mask->numel() == p.batch * p.heads * p.q_len * p.kv_len) {
      full.assign(size + 1, 0.0f);
      p.grad_mask = full.data();
    } else {
      sums.assign(size + 1, 0.0);
      p.grad_mask_sums = sums.data();
    }
    int64_t strides[4];
    broadcast_strides(grad_mask, {p.batch, p.heads, p.q_len, p.kv_len}, strides);
    p.grad_mask_batch = strides[0], p.grad_mask_head = strides[1];
    p.grad_mask_row = strides[2], p.grad_mask_column = strides[3];
  } else {
    const int64_t nothing[] = {0};
    grad_mask = empty_contiguous(1, nothing, dtype);
  }
  bool out_of_memory = false;
  p.out_of_memory = &out_of_memory;
  ff::kernels().attention_backward(p, parallel_for);
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
  if (p.grad_mask_sums) full.assign(sums.begin(), sums.end());
  if (!full.empty()) {
    ff::kernels().convert(full.data(), grad_mask.mutable_data_ptr(), p.mask_type,
                          grad_mask.numel());
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

#define FF_INPUTS                                                                         \
  "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_padding_mask, " \
  "Tensor? seed"
#define FF_OPTIONS "float dropout_p, int dropout_stream, bool is_causal, float? scale"

STABLE_TORCH_LIBRARY(fastfusion, m) {
  m.def("attention(" FF_INPUTS ", " FF_OPTIONS ", bool enable_gqa) -> (Tensor, Tensor)");
  m.def("attention_forward(" FF_INPUTS ", " FF_OPTIONS ", bool enable_gqa) -> (Tensor, Tensor)");
  m.def("attention_out(" FF_INPUTS ", " FF_OPTIONS ", bool enable_gqa) -> Tensor");
  m.def("attention_backward(Tensor grad_out, Tensor? grad_lse, " FF_INPUTS ", " FF_OPTIONS
        ", bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention_forward));
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_out", TORCH_BOX(&attention_out));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace
