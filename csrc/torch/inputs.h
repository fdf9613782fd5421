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
  MaybeTensor alibi_slopes = from.maybe_tensor("alibi_slopes");
  MaybeTensor seed = from.maybe_tensor("seed");
  double dropout_p = from.number("dropout_p", "0.");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
  bool enable_gqa = from.flag("enable_gqa");
  std::optional<int64_t> window_left = from.maybe_integer("window_left");
  std::optional<int64_t> window_right = from.maybe_integer("window_right");
  std::optional<double> softcap = from.maybe_number("softcap");
  MaybeTensor segment_ids_q = from.maybe_tensor("segment_ids_q");
  MaybeTensor segment_ids_k = from.maybe_tensor("segment_ids_k");
  MaybeTensor prefix_len = from.maybe_tensor("prefix_len");
  MaybeTensor key_scale = from.maybe_tensor("key_scale");
  MaybeTensor value_scale = from.maybe_tensor("value_scale");
  MaybeTensor position_index = from.maybe_tensor("position_index");
  MaybeTensor position_table = from.maybe_tensor("position_table");
  MaybeTensor sinks = from.maybe_tensor("sinks");
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
  MaybeTensor alibi_slopes = from.maybe_tensor("alibi_slopes");
  MaybeTensor seed = from.maybe_tensor("seed");
  double dropout_p = from.number("dropout_p", "0.");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
  std::optional<int64_t> window_left = from.maybe_integer("window_left");
  std::optional<int64_t> window_right = from.maybe_integer("window_right");
  std::optional<double> softcap = from.maybe_number("softcap");
  MaybeTensor segment_ids_q = from.maybe_tensor("segment_ids_q");
  MaybeTensor segment_ids_k = from.maybe_tensor("segment_ids_k");
  MaybeTensor prefix_len = from.maybe_tensor("prefix_len");
};

struct VarlenInputs {
  Arguments& from;
  Tensor query = from.tensor("query");
  Tensor key = from.tensor("key");
  Tensor value = from.tensor("value");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  Tensor cu_seqlens_q = from.tensor("cu_seqlens_q");
  Tensor cu_seqlens_k = from.tensor("cu_seqlens_k");
  MaybeTensor alibi_slopes = from.maybe_tensor("alibi_slopes");
  MaybeTensor seed = from.maybe_tensor("seed");
  int64_t max_seqlen_q = from.integer("max_seqlen_q");
  int64_t max_seqlen_k = from.integer("max_seqlen_k");
  double dropout_p = from.number("dropout_p", "0.");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
  std::optional<int64_t> window_left = from.maybe_integer("window_left");
  std::optional<int64_t> window_right = from.maybe_integer("window_right");
  std::optional<double> softcap = from.maybe_number("softcap");
  MaybeTensor prefix_len = from.maybe_tensor("prefix_len");
  MaybeTensor sinks = from.maybe_tensor("sinks");
};

struct WeightStatisticsInputs {
  Arguments& from;
  Tensor query = from.tensor("query");
  Tensor key = from.tensor("key");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor query_padding_mask = from.maybe_tensor("query_padding_mask");
  MaybeTensor key_padding_mask = from.maybe_tensor("key_padding_mask");
  bool entropy = from.flag("entropy");
  bool mass = from.flag("mass");
  bool is_causal = from.flag("is_causal");
  bool bottom_right = from.flag("bottom_right");
  std::optional<double> scale = from.maybe_number("scale");
};

struct CrossAttentionLayerInputs {
  Arguments& from;
  Tensor query = from.tensor("query");
  MaybeTensor context = from.maybe_tensor("context");
  MaybeTensor key = from.maybe_tensor("key");
  MaybeTensor value = from.maybe_tensor("value");
  Tensor q_weight = from.tensor("q_weight");
  MaybeTensor q_bias = from.maybe_tensor("q_bias");
  MaybeTensor kv_weight = from.maybe_tensor("kv_weight");
  MaybeTensor kv_bias = from.maybe_tensor("kv_bias");
  Tensor out_weight = from.tensor("out_weight");
  MaybeTensor out_bias = from.maybe_tensor("out_bias");
  MaybeTensor residual = from.maybe_tensor("residual");
  MaybeTensor query_norm_weight = from.maybe_tensor("query_norm_weight");
  MaybeTensor query_norm_bias = from.maybe_tensor("query_norm_bias");
  MaybeTensor context_norm_weight = from.maybe_tensor("context_norm_weight");
  MaybeTensor context_norm_bias = from.maybe_tensor("context_norm_bias");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor key_padding_mask = from.maybe_tensor("key_padding_mask");
  int64_t num_heads = from.integer("num_heads");
  std::optional<double> scale = from.maybe_number("scale");
  std::optional<double> query_norm_eps = from.maybe_number("query_norm_eps");
  std::optional<double> context_norm_eps = from.maybe_number("context_norm_eps");
  bool rms_norm = from.flag("rms_norm");
  MaybeTensor q_scale = from.maybe_tensor("q_scale");
  MaybeTensor kv_scale = from.maybe_tensor("kv_scale");
  MaybeTensor out_scale = from.maybe_tensor("out_scale");
  MaybeTensor v_scale = from.maybe_tensor("v_scale");
  MaybeTensor v_weight = from.maybe_tensor("v_weight");
  MaybeTensor v_bias = from.maybe_tensor("v_bias");
  MaybeTensor value_context = from.maybe_tensor("value_context");
};

// One of the two sequences of a CrossModalLayer.
struct StreamInputs {
  Arguments& from;
  const char* const* names;
  Tensor in_weight = from.tensor(names[0]);
  MaybeTensor in_bias = from.maybe_tensor(names[1]);
  Tensor out_weight = from.tensor(names[2]);
  MaybeTensor out_bias = from.maybe_tensor(names[3]);
  Tensor linear1_weight = from.tensor(names[4]);
  MaybeTensor linear1_bias = from.maybe_tensor(names[5]);
  Tensor linear2_weight = from.tensor(names[6]);
  MaybeTensor linear2_bias = from.maybe_tensor(names[7]);
  MaybeTensor norm1_weight = from.maybe_tensor(names[8]);
  MaybeTensor norm1_bias = from.maybe_tensor(names[9]);
  MaybeTensor norm2_weight = from.maybe_tensor(names[10]);
  MaybeTensor norm2_bias = from.maybe_tensor(names[11]);
};

// Of weights of 8-bit integers.
struct StreamScales {
  Arguments& from;
  const char* const* names;
  MaybeTensor in_scale = from.maybe_tensor(names[0]);
  MaybeTensor out_scale = from.maybe_tensor(names[1]);
  MaybeTensor linear1_scale = from.maybe_tensor(names[2]);
  MaybeTensor linear2_scale = from.maybe_tensor(names[3]);
};

constexpr const char* kVisualNames[] = {
    "visual_in_weight",      "visual_in_bias",      "visual_out_weight",     "visual_out_bias",
    "visual_linear1_weight", "visual_linear1_bias", "visual_linear2_weight", "visual_linear2_bias",
    "visual_norm1_weight",   "visual_norm1_bias",   "visual_norm2_weight",   "visual_norm2_bias"};
constexpr const char* kTextNames[] = {
    "text_in_weight",      "text_in_bias",      "text_out_weight",     "text_out_bias",
    "text_linear1_weight", "text_linear1_bias", "text_linear2_weight", "text_linear2_bias",
    "text_norm1_weight",   "text_norm1_bias",   "text_norm2_weight",   "text_norm2_bias"};
constexpr const char* kVisualScales[] = {"visual_in_scale", "visual_out_scale",
                                         "visual_linear1_scale", "visual_linear2_scale"};
constexpr const char* kTextScales[] = {"text_in_scale", "text_out_scale", "text_linear1_scale",
                                       "text_linear2_scale"};

struct CrossModalLayerInputs {
  Arguments& from;
  Tensor visual = from.tensor("visual");
  Tensor text = from.tensor("text");
  StreamInputs visual_weights{from, kVisualNames};
  StreamInputs text_weights{from, kTextNames};
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor visual_padding_mask = from.maybe_tensor("visual_padding_mask");
  MaybeTensor text_padding_mask = from.maybe_tensor("text_padding_mask");
  int64_t num_heads = from.integer("num_heads");
  int64_t activation = from.integer("activation");
  bool norm_first = from.flag("norm_first");
  double visual_norm1_eps = from.number("visual_norm1_eps");
  double visual_norm2_eps = from.number("visual_norm2_eps");
  double text_norm1_eps = from.number("text_norm1_eps");
  double text_norm2_eps = from.number("text_norm2_eps");
  StreamScales visual_scales{from, kVisualScales};
  StreamScales text_scales{from, kTextScales};
};

struct LinearInputs {
  Arguments& from;
  Tensor input = from.tensor("input");
  Tensor weight = from.tensor("weight");
  MaybeTensor bias = from.maybe_tensor("bias");
  MaybeTensor residual = from.maybe_tensor("residual");
  MaybeTensor weight_scale = from.maybe_tensor("weight_scale");
  int64_t activation = from.integer("activation", "0");
};

struct NormInputs {
  Arguments& from;
  Tensor input = from.tensor("input");
  MaybeTensor weight = from.maybe_tensor("weight");
  MaybeTensor bias = from.maybe_tensor("bias");
  MaybeTensor residual = from.maybe_tensor("residual");
  double eps = from.number("eps");
  bool rms = from.flag("rms");
};

struct EncoderLayerInputs {
  Arguments& from;
  Tensor input = from.tensor("input");
  Tensor in_proj_weight = from.tensor("in_proj_weight");
  MaybeTensor in_proj_bias = from.maybe_tensor("in_proj_bias");
  MaybeTensor k_proj_weight = from.maybe_tensor("k_proj_weight");
  MaybeTensor k_proj_bias = from.maybe_tensor("k_proj_bias");
  MaybeTensor v_proj_weight = from.maybe_tensor("v_proj_weight");
  MaybeTensor v_proj_bias = from.maybe_tensor("v_proj_bias");
  Tensor out_proj_weight = from.tensor("out_proj_weight");
  MaybeTensor out_proj_bias = from.maybe_tensor("out_proj_bias");
  Tensor linear1_weight = from.tensor("linear1_weight");
  MaybeTensor linear1_bias = from.maybe_tensor("linear1_bias");
  Tensor linear2_weight = from.tensor("linear2_weight");
  MaybeTensor linear2_bias = from.maybe_tensor("linear2_bias");
  MaybeTensor norm1_weight = from.maybe_tensor("norm1_weight");
  MaybeTensor norm1_bias = from.maybe_tensor("norm1_bias");
  MaybeTensor norm2_weight = from.maybe_tensor("norm2_weight");
  MaybeTensor norm2_bias = from.maybe_tensor("norm2_bias");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor key_padding_mask = from.maybe_tensor("key_padding_mask");
  MaybeTensor in_proj_scale = from.maybe_tensor("in_proj_scale");
  MaybeTensor k_proj_scale = from.maybe_tensor("k_proj_scale");
  MaybeTensor v_proj_scale = from.maybe_tensor("v_proj_scale");
  MaybeTensor out_proj_scale = from.maybe_tensor("out_proj_scale");
  MaybeTensor linear1_scale = from.maybe_tensor("linear1_scale");
  MaybeTensor linear2_scale = from.maybe_tensor("linear2_scale");
  int64_t num_heads = from.integer("num_heads");
  int64_t activation = from.integer("activation");
  bool norm_first = from.flag("norm_first");
  bool is_causal = from.flag("is_causal");
  double norm1_eps = from.number("norm1_eps");
  double norm2_eps = from.number("norm2_eps");
  MaybeTensor cu_seqlens = from.maybe_tensor("cu_seqlens");
};

// `kWrites`: whether the op writes to the caches.
template <bool kWrites>
struct DecoderLayerInputs {
  Arguments& from;
  Tensor input = from.tensor("input");
  Tensor self_q_weight = from.tensor("self_q_weight");
  MaybeTensor self_q_bias = from.maybe_tensor("self_q_bias");
  MaybeTensor self_k_weight = from.maybe_tensor("self_k_weight");
  MaybeTensor self_k_bias = from.maybe_tensor("self_k_bias");
  MaybeTensor self_v_weight = from.maybe_tensor("self_v_weight");
  MaybeTensor self_v_bias = from.maybe_tensor("self_v_bias");
  Tensor self_out_weight = from.tensor("self_out_weight");
  MaybeTensor self_out_bias = from.maybe_tensor("self_out_bias");
  MaybeTensor cross_q_weight = from.maybe_tensor("cross_q_weight");
  MaybeTensor cross_q_bias = from.maybe_tensor("cross_q_bias");
  MaybeTensor cross_k_weight = from.maybe_tensor("cross_k_weight");
  MaybeTensor cross_k_bias = from.maybe_tensor("cross_k_bias");
  MaybeTensor cross_v_weight = from.maybe_tensor("cross_v_weight");
  MaybeTensor cross_v_bias = from.maybe_tensor("cross_v_bias");
  MaybeTensor cross_out_weight = from.maybe_tensor("cross_out_weight");
  MaybeTensor cross_out_bias = from.maybe_tensor("cross_out_bias");
  Tensor linear1_weight = from.tensor("linear1_weight");
  MaybeTensor linear1_bias = from.maybe_tensor("linear1_bias");
  Tensor linear2_weight = from.tensor("linear2_weight");
  MaybeTensor linear2_bias = from.maybe_tensor("linear2_bias");
  MaybeTensor norm1_weight = from.maybe_tensor("norm1_weight");
  MaybeTensor norm1_bias = from.maybe_tensor("norm1_bias");
  MaybeTensor norm2_weight = from.maybe_tensor("norm2_weight");
  MaybeTensor norm2_bias = from.maybe_tensor("norm2_bias");
  MaybeTensor norm3_weight = from.maybe_tensor("norm3_weight");
  MaybeTensor norm3_bias = from.maybe_tensor("norm3_bias");
  MaybeTensor memory = from.maybe_tensor("memory");
  MaybeTensor memory_key = from.maybe_tensor("memory_key");
  MaybeTensor memory_value = from.maybe_tensor("memory_value");
  MaybeTensor memory_mask = from.maybe_tensor("memory_mask");
  MaybeTensor attn_mask = from.maybe_tensor("attn_mask");
  MaybeTensor key_padding_mask = from.maybe_tensor("key_padding_mask");
  MaybeTensor memory_padding_mask = from.maybe_tensor("memory_padding_mask");
  MaybeTensor self_q_scale = from.maybe_tensor("self_q_scale");
  MaybeTensor self_k_scale = from.maybe_tensor("self_k_scale");
  MaybeTensor self_v_scale = from.maybe_tensor("self_v_scale");
  MaybeTensor self_out_scale = from.maybe_tensor("self_out_scale");
  MaybeTensor cross_q_scale = from.maybe_tensor("cross_q_scale");
  MaybeTensor cross_k_scale = from.maybe_tensor("cross_k_scale");
  MaybeTensor cross_v_scale = from.maybe_tensor("cross_v_scale");
  MaybeTensor cross_out_scale = from.maybe_tensor("cross_out_scale");
  MaybeTensor linear1_scale = from.maybe_tensor("linear1_scale");
  MaybeTensor linear2_scale = from.maybe_tensor("linear2_scale");
  MaybeTensor key_cache = kWrites ? from.written("key_cache") : from.maybe_tensor("key_cache");
  MaybeTensor value_cache =
      kWrites ? from.written("value_cache") : from.maybe_tensor("value_cache");
  int64_t num_heads = from.integer("num_heads");
  int64_t past_length = from.integer("past_length");
  int64_t activation = from.integer("activation");
  bool norm_first = from.flag("norm_first");
  bool is_causal = from.flag("is_causal");
  double norm1_eps = from.number("norm1_eps");
  double norm2_eps = from.number("norm2_eps");
  double norm3_eps = from.number("norm3_eps");
};

}  // namespace
