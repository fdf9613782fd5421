// What the torch front end of every op shares: checks, views and outputs, over torch's stable ABI
// (torch >= 2.11). Every check that memory safety depends on is on this side, since compiled graphs
// call the ops without Python; the words for a person come from check() of an op's Python file.
//
// FF_TORCH_CUDA: the kernels take tensors on a GPU; without it on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <vector>

#include "calls.h"
#include "inputs.h"

namespace {

using torch::headeronly::ScalarType;

constexpr double kTwo32 = 4294967296.0;

inline ff::Type kernel_type(ScalarType type) {
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
      STD_TORCH_CHECK(false, "fastfusion: this dtype has no kernel");
  }
}

inline void check_fits(bool fits, const char* name) {
  STD_TORCH_CHECK(fits, "fastfusion: ", name, " does not fit");
}

// Where the kernels take tensors, and whether one can be used together with `query`.
#ifdef FF_TORCH_CUDA
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
inline int32_t device_index(const Tensor& tensor) { return tensor.get_device_index(); }
inline bool is_here(const Tensor& tensor, const Tensor& query) {
  return tensor.is_cuda() && device_index(tensor) == device_index(query);
}
#else
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
inline int32_t device_index(const Tensor&) { return 0; }
inline bool is_here(const Tensor& tensor, const Tensor&) { return tensor.is_cpu(); }
#endif

// Dtype and device of a tensor that is to be made, in torch's codes.
struct Kind {
  int32_t dtype, device_index;
};

inline Kind kind_of(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return {dtype, device_index(tensor)};
}

inline Kind float32_beside(const Tensor& tensor) {
  return {aoti_torch_dtype_float32(), device_index(tensor)};
}

// torch::stable::new_empty goes through the dispatcher and costs 0.9 us more.
inline Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, Kind kind) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, kind.dtype, device_type(),
                                                  kind.device_index, &handle));
  return Tensor(handle);
}

inline Tensor empty_contiguous(int64_t dims, const int64_t* sizes, Kind kind) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  int64_t stride = 1;
  for (int64_t i = dims; i-- > 0;) {
    strides[size_t(i)] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  return empty(dims, sizes, strides.data(), kind);
}

// (B, heads, length, dim) in memory (B, length, heads, dim): modules need no copy.
inline Tensor empty_rows_outside(int64_t batch, int64_t heads, int64_t length, int64_t dim,
                                 Kind kind) {
  const auto size = [](int64_t n) { return n > 0 ? n : int64_t{1}; };
  const int64_t row = size(heads) * size(dim);
  const int64_t sizes[] = {batch, heads, length, dim};
  const int64_t strides[] = {size(length) * row, size(dim), row, 1};
  return empty(4, sizes, strides, kind);
}

inline ff::View view(const Tensor& t) {
  const auto strides = t.strides();
  return {t.const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

inline ff::MutableView mutable_view(const Tensor& t) {
  const auto strides = t.strides();
  return {t.mutable_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

inline ff::MutableLse mutable_lse(const Tensor& t) {
  return {static_cast<float*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// Strides of a tensor that broadcasts to (B, H, Lq, Lk); 0 along what it repeats.
inline void broadcast_strides(const Tensor& mask, const int64_t (&target)[4],
                              int64_t (&strides)[4]) {
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

// The data of a mask that is to be bool (batch, length).
inline const ff::Bool* padding_data(const Tensor& padding, int64_t batch, int64_t length,
                                    const Tensor& query) {
  STD_TORCH_CHECK(padding.dim() == 2 && padding.scalar_type() == ScalarType::Bool &&
                      padding.size(0) == batch && padding.size(1) == length &&
                      is_here(padding, query),
                  "fastfusion: a padding mask does not fit");
  return static_cast<const ff::Bool*>(padding.const_data_ptr());
}

inline void describe_scale(ff::Attention& p, std::optional<double> scale) {
  p.scale = float(scale ? *scale : 1.0 / std::sqrt(double(p.head_dim)));
  STD_TORCH_CHECK(std::isfinite(p.scale), "fastfusion: scale must be finite");
}

// What follows the tensors in the inputs of every op, once sizes are known.
template <class Inputs>
inline void describe_options(ff::Attention& p, const Inputs& in) {
  describe_scale(p, in.scale);
  p.diagonal = in.bottom_right ? p.kv_len - p.q_len : 0;
  const auto side = [](std::optional<int64_t> keys) {
    STD_TORCH_CHECK(!keys || *keys >= 0, "fastfusion: a window must not be negative");
    return keys && *keys < ff::kEndless ? *keys : ff::kEndless;
  };
  p.left = side(in.window_left), p.right = in.is_causal ? 0 : side(in.window_right);
  p.softcap = in.softcap ? float(*in.softcap) : 0.0f;
  STD_TORCH_CHECK(!in.softcap || (*in.softcap >= 0x1p-100 && *in.softcap <= 0x1p100),
                  "fastfusion: softcap must be between 2^-100 and 2^100");
  STD_TORCH_CHECK(in.dropout_p >= 0.0 && in.dropout_p <= 1.0 && (in.dropout_p == 0.0 || in.seed),
                  "fastfusion: dropout_p must be between 0 and 1 and come with a seed");
  if (in.dropout_p > 0.0) {
    const Tensor& seed = *in.seed;
    STD_TORCH_CHECK(seed.is_cpu() && (seed.numel() == 1 || seed.numel() == 5) &&
                        seed.scalar_type() == ScalarType::Long && seed.is_contiguous(),
                    "fastfusion: seed must be one int64, or five: with the place in a larger call");
    const int64_t* numbers = static_cast<const int64_t*>(seed.const_data_ptr());
    p.dropout = true;
    p.seed = uint64_t(numbers[0]);
    if (seed.numel() == 5)
      p.first_query = numbers[1], p.first_key = numbers[2], p.first_head = numbers[3],
      p.all_heads = numbers[4];
    p.threshold = uint64_t(std::nearbyint(in.dropout_p * kTwo32));
    p.keep_scale = in.dropout_p < 1.0 ? float(1.0 / (1.0 - in.dropout_p)) : 0.0f;
  }
}

// Dtype and device of a query and what goes with it, once sizes are known to agree.
template <class... Others>
inline void describe_kind(ff::Attention& p, const Tensor& query, const Others&... others) {
  const bool grouped = p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0;
  STD_TORCH_CHECK(p.head_dim > 0 && grouped,
                  "fastfusion: the shapes of query, key and value do not fit");
  STD_TORCH_CHECK(p.kv_len <= INT32_MAX && p.q_len <= INT32_MAX, "fastfusion: too long");
  const ScalarType type = query.scalar_type();
  const bool alike = ((others.scalar_type() == type && is_here(others, query)) && ...);
  STD_TORCH_CHECK(alike && is_here(query, query) && type != ScalarType::Bool,
                  "fastfusion: dtypes or devices differ");
  p.type = kernel_type(type);
}

// A mask that broadcasts to `scores`.
inline void describe_mask(ff::Attention& p, const Tensor& query, const MaybeTensor& mask,
                          const int64_t (&scores)[4]) {
  if (!mask) return;
  STD_TORCH_CHECK(is_here(*mask, query), "fastfusion: attn_mask is on another device");
  const ScalarType mask_type = mask->scalar_type();
  STD_TORCH_CHECK(mask_type == ScalarType::Bool || mask_type == ScalarType::Float ||
                      mask_type == query.scalar_type(),
                  "fastfusion: attn_mask has the wrong dtype");
  int64_t strides[4];
  broadcast_strides(*mask, scores, strides);
  p.mask = {mask->const_data_ptr(), strides[0], strides[1], strides[2], strides[3]};
  p.mask_type = kernel_type(mask_type);
}

// Once sizes are known.
inline void describe_masks(ff::Attention& p, const Tensor& query, const MaybeTensor& mask,
                           const MaybeTensor& padding) {
  describe_mask(p, query, mask, {p.batch, p.heads, p.q_len, p.kv_len});
  if (padding) {
    p.padding = padding_data(*padding, p.batch, p.kv_len, query);
    p.padding_batch = padding->stride(0), p.padding_column = padding->stride(1);
  }
}

// Slopes of ALiBi: (batch, heads).
inline void describe_slopes(ff::Attention& p, const Tensor& query, const MaybeTensor& slopes,
                            int64_t batch) {
  if (!slopes) return;
  STD_TORCH_CHECK(slopes->dim() == 2 && slopes->size(0) == batch && slopes->size(1) == p.heads &&
                      slopes->scalar_type() == ScalarType::Float && is_here(*slopes, query),
                  "fastfusion: alibi_slopes must be float32 (batch, heads)");
  p.alibi = {static_cast<const float*>(slopes->const_data_ptr()), slopes->stride(0),
             slopes->stride(1)};
}

// Integers of a call, of these sizes, or null.
inline const int64_t* integers(const MaybeTensor& given, std::initializer_list<int64_t> sizes,
                               const Tensor& query, const char* name) {
  if (!given) return nullptr;
  bool fits = given->dim() == int64_t(sizes.size()) && is_here(*given, query) &&
              given->scalar_type() == ScalarType::Long;
  for (size_t i = 0; i < sizes.size() && fits; ++i)
    fits = given->size(int64_t(i)) == sizes.begin()[i];
  check_fits(fits, name);
  return static_cast<const int64_t*>(given->const_data_ptr());
}

// Segments and prefixes.
template <class Inputs>
inline void describe_rules(ff::Attention& p, const Inputs& in) {
  STD_TORCH_CHECK(in.segment_ids_q.has_value() == in.segment_ids_k.has_value(),
                  "fastfusion: segment_ids_q and segment_ids_k come together");
  STD_TORCH_CHECK(!in.prefix_len || in.is_causal, "fastfusion: prefix_len needs is_causal");
  const auto segments = [&](const MaybeTensor& ids, int64_t length, const char* name) {
    const int64_t* data = integers(ids, {p.batch, length}, in.query, name);
    return data ? ff::Integers{data, ids->stride(0), ids->stride(1)} : ff::Integers{};
  };
  p.rules.q_segments = segments(in.segment_ids_q, p.q_len, "segment_ids_q");
  p.rules.k_segments = segments(in.segment_ids_k, p.kv_len, "segment_ids_k");
  const int64_t* prefixes = integers(in.prefix_len, {p.batch}, in.query, "prefix_len");
  if (prefixes) p.rules.prefixes = {prefixes, in.prefix_len->stride(0)};
}

// Attention sinks: (heads).
inline void describe_sinks(ff::Attention& p, const Tensor& query, const MaybeTensor& sinks) {
  if (!sinks) return;
  STD_TORCH_CHECK(sinks->dim() == 1 && sinks->size(0) == p.heads &&
                      sinks->scalar_type() == ScalarType::Float && is_here(*sinks, query),
                  "fastfusion: sinks must be float32 (heads)");
  p.sinks = {static_cast<const float*>(sinks->const_data_ptr()), sinks->stride(0)};
}

// The index of a call's position table, null without one.
inline const int64_t* position_index(const ff::Attention& p, const AttentionInputs& in) {
  STD_TORCH_CHECK(in.position_table.has_value() == in.position_index.has_value(),
                  "fastfusion: position_table and position_index come together");
  if (!in.position_table) return nullptr;
  const Tensor& table = *in.position_table;
  check_fits(table.dim() == 2 && table.size(0) == p.heads && is_here(table, in.query) &&
                 table.scalar_type() == ScalarType::Float && table.size(1) <= INT32_MAX &&
                 (table.size(1) > 0 || p.q_len * p.kv_len == 0),
             "position_table");
  if (in.position_index->dim() != 1)
    return integers(in.position_index, {p.q_len, p.kv_len}, in.query, "position_index");
  const int64_t count = p.q_len + p.kv_len - 1;
  return integers(in.position_index, {count > 0 ? count : 0}, in.query, "position_index");
}

inline bool is_float8(const Tensor& tensor, const Tensor& query) {
  return tensor.scalar_type() == ScalarType::Float8_e4m3fn && is_here(tensor, query);
}

// Of (batch, heads, length, dim) tensors; `float8`: the keys and values are of 8 bits.
template <class Inputs>
inline void describe_batched(ff::Attention& p, const Inputs& in, bool float8 = false) {
  STD_TORCH_CHECK(in.query.dim() == 4 && in.key.dim() == 4 && in.value.dim() == 4,
                  "fastfusion: query, key and value must be 4-D");
  const auto q = in.query.sizes(), k = in.key.sizes(), v = in.value.sizes();
  p.batch = q[0], p.heads = q[1], p.q_len = q[2], p.head_dim = q[3];
  p.kv_heads = k[1], p.kv_len = k[2], p.value_dim = v[3];
  STD_TORCH_CHECK(k[0] == q[0] && v[0] == q[0] && v[1] == k[1] && v[2] == k[2] && k[3] == q[3],
                  "fastfusion: the shapes of query, key and value do not fit");
  if (float8) {
    describe_kind(p, in.query);
    STD_TORCH_CHECK(is_float8(in.key, in.query) && is_float8(in.value, in.query),
                    "fastfusion: dtypes or devices differ");
  } else {
    describe_kind(p, in.query, in.key, in.value);
  }
  p.query = view(in.query), p.key = view(in.key), p.value = view(in.value);

  describe_masks(p, in.query, in.attn_mask, in.key_padding_mask);
  describe_slopes(p, in.query, in.alibi_slopes, p.batch);
  describe_rules(p, in);
  describe_options(p, in);
}

inline void describe(ff::Attention& p, const AttentionInputs& in, bool float8 = false) {
  describe_batched(p, in, float8);
  STD_TORCH_CHECK(float8 || (!in.key_scale && !in.value_scale),
                  "fastfusion: key_scale and value_scale are of keys of 8 bits");
  STD_TORCH_CHECK(in.enable_gqa || p.heads == p.kv_heads || p.kv_heads == 1,
                  "fastfusion: more query heads than key heads need enable_gqa");
  describe_sinks(p, in.query, in.sinks);
}

inline void describe(ff::Bidirectional& p, const BidirectionalInputs& in) {
  describe_batched(p, in);
  STD_TORCH_CHECK(p.heads == p.kv_heads, "fastfusion: key must have the heads of query");
  const Tensor& query_value = in.query_value;
  STD_TORCH_CHECK(query_value.dim() == 4 && query_value.size(0) == p.batch &&
                      query_value.size(1) == p.heads && query_value.size(2) == p.q_len &&
                      is_here(query_value, in.query) &&
                      query_value.scalar_type() == in.query.scalar_type(),
                  "fastfusion: query_value does not fit");
  p.query_value_dim = query_value.size(3);
  p.query_value = view(query_value);
  if (in.query_padding_mask) {
    p.query_padding = padding_data(*in.query_padding_mask, p.batch, p.q_len, in.query);
    p.query_padding_batch = in.query_padding_mask->stride(0);
    p.query_padding_column = in.query_padding_mask->stride(1);
  }
}

// The outputs of a call that is described; `lse` where it is wanted.
inline Tensor make_out(ff::AttentionForward& p, const Tensor& query, Tensor* lse) {
  Tensor out = empty_rows_outside(p.batch, p.heads, p.q_len, p.value_dim, kind_of(query));
  p.out = mutable_view(out);
  if (lse) {
    const int64_t sizes[] = {p.batch, p.heads, p.q_len};
    *lse = empty_contiguous(3, sizes, float32_beside(query));
    p.lse = mutable_lse(*lse);
  }
  return out;
}

struct Outputs {
  Tensor out_q, out_k, lse_q, lse_k;
};

inline Outputs make_outputs(ff::BidirectionalForward& p, const Tensor& query, bool lse) {
  const Kind kind = kind_of(query);
  Outputs r;
  r.out_q = empty_rows_outside(p.batch, p.heads, p.q_len, p.value_dim, kind);
  r.out_k = empty_rows_outside(p.batch, p.heads, p.kv_len, p.query_value_dim, kind);
  p.out_q = mutable_view(r.out_q), p.out_k = mutable_view(r.out_k);
  if (lse) {
    const int64_t rows[] = {p.batch, p.heads, p.q_len}, columns[] = {p.batch, p.heads, p.kv_len};
    r.lse_q = empty_contiguous(3, rows, float32_beside(query));
    r.lse_k = empty_contiguous(3, columns, float32_beside(query));
    p.lse_q = mutable_lse(r.lse_q), p.lse_k = mutable_lse(r.lse_k);
  }
  return r;
}

}  // namespace
