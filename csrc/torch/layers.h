// What the front ends of linear and of the layers share: their tensors as kernels read them.
#pragma once

#include <initializer_list>
#include <list>

#include "cpu_calls.h"

namespace {

// A weight as the inputs of an op have it.
struct Projection {
  const Tensor& weight;
  const MaybeTensor &scale, &bias;
};

struct MaybeProjection {
  const MaybeTensor &weight, &scale, &bias;
};

// Tensors of a call as rows and weights, kept alive; what kernels cannot read where it is is
// copied.
class LayerOperands {
 public:
  explicit LayerOperands(const Tensor& input) : input_(input) {
    check_fits(input.is_cpu() && input.dim() > 0, "input");
    type = kernel_type(input.scalar_type());
    check_fits(type != ff::Type::kBool, "input");
  }

  struct Matrix {
    const void* data;
    int64_t rows, width, stride;
  };

  // A tensor as a matrix of its rows: itself where these are at one stride and their elements side
  // by side.
  Matrix matrix(const Tensor& given) {
    const Tensor& tensor = is_matrix(given) ? given : copy(given);
    const int64_t dims = tensor.dim(), width = tensor.size(dims - 1);
    const int64_t rows = width > 0 ? tensor.numel() / width : 0;
    // Of one row the stride may be anything.
    const int64_t stride = dims > 1 && rows > 1 ? tensor.stride(dims - 2) : width;
    return {tensor.const_data_ptr(), rows, width, stride};
  }

  // A residual of these sizes.
  Matrix residual(const Tensor& given, const int64_t* sizes, int64_t dims) {
    check_fits(is_like_input(given) && given.dim() == dims, "residual");
    for (int64_t i = 0; i < dims; ++i) check_fits(given.size(i) == sizes[i], "residual");
    return matrix(given);
  }

  // (width), or nothing.
  const void* vector(const MaybeTensor& given, int64_t width, const char* name) {
    if (!given) return nullptr;
    check_fits(is_like_input(*given) && given->dim() == 1 && given->size(0) == width, name);
    return contiguous(*given).const_data_ptr();
  }

  // A weight for rows of `width` numbers, and how many features it has.
  ff::Weight weight(const Tensor& given, const MaybeTensor& scale, const MaybeTensor& bias,
                    int64_t width, int64_t* features, const char* name) {
    ff::Weight found;
    if (scale) {
      found = packed(given, *scale, width, name);
      *features = scale->size(0);
    } else {
      const ScalarType kind = given.scalar_type();
      const bool half = kind == ScalarType::BFloat16 || kind == ScalarType::Half;
      check_fits(given.is_cpu() && given.dim() == 2 && given.size(1) == width && width > 0 &&
                     (kind == input_.scalar_type() || (half && type == ff::Type::kFloat32)),
                 name);
      const Matrix rows = matrix(given);
      found.data = rows.data, found.row = rows.stride, found.type = kernel_type(kind);
      *features = given.size(0);
    }
    check_fits(*features <= INT32_MAX, name);
    found.bias = vector(bias, *features, name);
    return found;
  }

  // The same of so many features.
  ff::Weight weight(const Tensor& given, const MaybeTensor& scale, const MaybeTensor& bias,
                    int64_t width, int64_t features, const char* name) {
    int64_t found;
    const ff::Weight made = weight(given, scale, bias, width, &found, name);
    check_fits(found == features, name);
    return made;
  }

  // Of query, key and value, each `width` wide: `all` is that of the three, or of the query alone.
  ff::Weights projections(const Projection& all, const MaybeProjection& key,
                          const MaybeProjection& value, int64_t width) {
    check_fits(bool(key.weight) == bool(value.weight), "k_proj_weight or v_proj_weight");
    ff::Weights found;
    found.count = key.weight ? 3 : 1;
    found.each[0] = weight(all.weight, all.scale, all.bias, width, 3 / found.count * width,
                           "in_proj_weight or its bias");
    found.each[1] = maybe_weight(key, width, width, "k_proj_weight or its bias");
    found.each[2] = maybe_weight(value, width, width, "v_proj_weight or its bias");
    return found;
  }

  // A weight that may be missing, with all that belongs to it.
  ff::Weight maybe_weight(const MaybeProjection& given, int64_t width, int64_t features,
                          const char* name) {
    if (given.weight) return weight(*given.weight, given.scale, given.bias, width, features, name);
    check_fits(!given.scale && !given.bias, name);
    return {};
  }

  ff::Norm norm(const MaybeTensor& weight, const MaybeTensor& bias, double eps, int64_t width,
                const char* name) {
    ff::Norm found;
    found.weight = vector(weight, width, name), found.bias = vector(bias, width, name);
    found.eps = float(eps);
    return found;
  }

  ff::Type type;  // of the input

 private:
  bool is_like_input(const Tensor& t) const {
    return t.is_cpu() && t.scalar_type() == input_.scalar_type();
  }

  // (parts, panels, steps, 64, 4): see csrc/cpu/layers/linear_int8.h.
  ff::Weight packed(const Tensor& given, const Tensor& scale, int64_t width, const char* name) {
    check_fits(given.is_cpu() && given.scalar_type() == ScalarType::Byte && given.dim() == 5 &&
                   given.size(0) > 0 && scale.is_cpu() &&
                   scale.scalar_type() == ScalarType::Float && scale.dim() == 1 &&
                   scale.size(0) % given.size(0) == 0 && width > 0 && width <= ff::kInt8Widest,
               name);
    ff::Weight found;
    found.type = ff::Type::kUInt8;
    found.part_features = scale.size(0) / given.size(0);
    check_fits(given.size(1) == (found.part_features + ff::kInt8Panel - 1) / ff::kInt8Panel &&
                   given.size(2) == (width + ff::kInt8Step - 1) / ff::kInt8Step &&
                   given.size(3) == ff::kInt8Panel && given.size(4) == ff::kInt8Step,
               name);
    found.data = contiguous(given).const_data_ptr();
    found.scales = static_cast<const float*>(contiguous(scale).const_data_ptr());
    return found;
  }

  static bool is_matrix(const Tensor& tensor) {
    const int64_t dims = tensor.dim();
    if (tensor.size(dims - 1) > 1 && tensor.stride(dims - 1) != 1) return false;
    for (int64_t i = dims - 2; i > 0; --i)
      if (tensor.size(i - 1) > 1 && tensor.stride(i - 1) != tensor.stride(i) * tensor.size(i))
        return false;
    return true;
  }

  const Tensor& contiguous(const Tensor& t) { return t.is_contiguous() ? t : copy(t); }
  const Tensor& copy(const Tensor& t) { return copies_.emplace_back(torch::stable::contiguous(t)); }

  const Tensor& input_;
  std::list<Tensor> copies_;
};

// The heads of an attention over `inner` features.
inline void describe_heads(ff::Attention& p, ff::Type type, int64_t heads, int64_t inner) {
  check_fits(heads > 0 && inner > 0 && inner % heads == 0, "num_heads");
  p.heads = p.kv_heads = heads, p.head_dim = p.value_dim = inner / heads;
  p.type = type;
}

// (batch, heads, length, head_dim) of an attention whose shapes and type are described.
inline void check_heads(const Tensor& t, const ff::Attention& p, int64_t length, const char* name) {
  check_fits(t.is_cpu() && t.scalar_type() != ScalarType::Bool &&
                 kernel_type(t.scalar_type()) == p.type && t.dim() == 4 && t.size(0) == p.batch &&
                 t.size(1) == p.heads && t.size(2) == length && t.size(3) == p.head_dim,
             name);
}

// The type of an attention to keys that are given, beside tokens of another.
inline ff::Type type_of_keys(const Tensor& keys, ff::Type tokens) {
  const bool narrow = tokens == ff::Type::kFloat32 && keys.scalar_type() == ScalarType::BFloat16;
  return narrow ? ff::Type::kBFloat16 : tokens;
}

// The type of an attention to keys that are projected by the last of these weights, beside tokens
// of another: what narrow weights gave has no more digits than bfloat16, whose products take half
// the time.
inline ff::Type type_of_products(ff::Type tokens, std::initializer_list<ff::Weight> weights) {
  if (tokens != ff::Type::kFloat32) return tokens;
  for (const ff::Weight& weight : weights)
    if (weight.type != ff::Type::kBFloat16 && weight.type != ff::Type::kUInt8) return tokens;
  return ff::Type::kBFloat16;
}

inline ff::Type type_of_products(ff::Type tokens, const ff::Weights& weights) {
  const ff::Weight* w = weights.each;
  return weights.count == 1 ? type_of_products(tokens, {w[0]})
                            : type_of_products(tokens, {w[0], w[1], w[2]});
}

inline ff::Activation activation_of(int64_t number) {
  check_fits(number >= 0 && number <= int64_t(ff::Activation::kQuickGelu), "activation");
  return ff::Activation(number);
}

}  // namespace
