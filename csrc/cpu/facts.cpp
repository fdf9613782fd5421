// The facts about the kernels and the choice of instruction set, in C, for ctypes
// (fastfusion/backends/native.py): what needs no torch needs no Python either.

#include <cstring>

#include "api.h"

namespace {

ff::Type type_of(const char* dtype) {
  const auto is = [dtype](const char* name) { return std::strcmp(dtype, name) == 0; };
  return is("bfloat16")  ? ff::Type::kBFloat16
         : is("float16") ? ff::Type::kFloat16
         : is("int8")    ? ff::Type::kUInt8
                         : ff::Type::kFloat32;
}

}  // namespace

extern "C" {

FF_EXPORT const char* ff_isa() { return ff::kernels().isa; }

FF_EXPORT int ff_lanes() { return ff::kernels().lanes; }

FF_EXPORT const char* ff_cpu_features() { return ff::cpu_features(); }

// The name of the index-th set of kernels, best first; null past the end.
FF_EXPORT const char* ff_compiled_isa(int index) { return ff::compiled_isa(index); }

FF_EXPORT bool ff_supported_isa(int index) { return ff::supported_isa(index); }

// Null, or why the set cannot be used; an empty name: the best.
FF_EXPORT const char* ff_select_isa(const char* name) { return ff::select_isa(name); }

// How attention of these would run, in words; *splits: into how many pieces its keys are cut.
FF_EXPORT const char* ff_attention_path(const char* dtype, int64_t q_len, int64_t kv_len,
                                        bool causal, bool dropout, int64_t* splits) {
  ff::AttentionForward p{};
  p.type = type_of(dtype), p.q_len = q_len, p.kv_len = kv_len;
  p.right = causal ? 0 : ff::kEndless, p.dropout = dropout, p.scale = 1.0f;
  *splits = ff::kernels().attention_splits(p);
  return ff::kernels().attention_path(p);
}

// Multiplies and adds in the arithmetic of a dtype, and does nothing else; returns the number of
// operations.
FF_EXPORT double ff_peak_operations(const char* dtype, int64_t rounds) {
  return ff::kernels().peak_operations(type_of(dtype), rounds);
}

}  // extern "C"
