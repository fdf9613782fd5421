// The inputs of the ops, in the order of their schemas. This is the only list of them in
// C++: a new argument is a line here, and the code that reads it.
#pragma once

#include "op.h"

namespace {

struct AttentionInputs {
  Arguments& from;
  Tensor query = from.tensor("query");
  Tensor key = from.tensor("key");
  Tensor value = from.tensor("value");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor key_padding_mask = from.maybe_tensor("key_padding_mask");
  MaybeTensor seed = from.maybe_tensor("seed");
  double dropout_p = from.number("dropout_p");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
  bool enable_gqa = from.flag("enable_gqa");
};

struct BidirectionalInputs {
  Arguments& from;
  Tensor query = from.tensor("query");
  Tensor key = from.tensor("key");
  Tensor value = from.tensor("value");
  Tensor query_value = from.tensor("query_value");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor query_padding_mask = from.maybe_tensor("query_padding_mask");
  MaybeTensor key_padding_mask = from.maybe_tensor("key_padding_mask");
  MaybeTensor seed = from.maybe_tensor("seed");
  double dropout_p = from.number("dropout_p");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
};

struct VarlenInputs {
  Arguments& from;
  Tensor query = from.tensor("query");
  Tensor key = from.tensor("key");
  Tensor value = from.tensor("value");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  Tensor cu_seqlens_q = from.tensor("cu_seqlens_q");
  Tensor cu_seqlens_k = from.tensor("cu_seqlens_k");
  MaybeTensor seed = from.maybe_tensor("seed");
  int64_t max_seqlen_q = from.integer("max_seqlen_q");
  int64_t max_seqlen_k = from.integer("max_seqlen_k");
  double dropout_p = from.number("dropout_p");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
};

struct LinearInputs {
  Arguments& from;
  Tensor input = from.tensor("input");
  Tensor weight = from.tensor("weight");
  MaybeTensor bias = from.maybe_tensor("bias");
  MaybeTensor residual = from.maybe_tensor("residual");
  int64_t activation = from.integer("activation");
};

}  // namespace
