// The interface of the CUDA kernels, without torch and without CUDA's own headers.
//
// Pointers are to memory of the current device. Nothing is allocated and nothing waits: a call is
// one launch or two on `stream` (a cudaStream_t), so that CUDA graphs can capture it. Functions
// return null, or what is wrong as a text. `out_of_memory`, `sums`, `ranges`, `entry` and what
// belongs to dropout are not used.
#pragma once

#include <cstdint>

#include "calls.h"
#include "cuda/float8.h"

#ifdef FF_CUDA_EMULATED
#define FF_CUDA_EXPORT
#else
#define FF_CUDA_EXPORT __attribute__((visibility("default")))
#endif

namespace ff::cuda {

// Bytes of device memory, aligned to 256, that a call needs beside its outputs; mostly 0.
FF_CUDA_EXPORT int64_t attention_workspace(const AttentionForward& call, int capability);

// Attention forward, as scaled_dot_product_attention.py defines it: head dims up to 256, any
// strides whose last is 1, masks at any strides and of all kinds; no dropout.
FF_CUDA_EXPORT const char* attention_forward(const AttentionForward& call, void* workspace,
                                             void* stream);

// How attention_forward runs a call on a device, for people.
FF_CUDA_EXPORT const char* attention_path(const AttentionForward& call, int capability);

// The same for keys and values of 8 bits beside queries of 16, from compute capability 8.9 on.
FF_CUDA_EXPORT int64_t attention_workspace(const Float8Forward& call, int capability);
FF_CUDA_EXPORT const char* attention_forward(const Float8Forward& call, void* workspace,
                                             void* stream);
FF_CUDA_EXPORT const char* attention_path(const Float8Forward& call, int capability);
FF_CUDA_EXPORT bool runs_float8(Type type, int capability);

// The same for attention in both directions.
FF_CUDA_EXPORT int64_t bidirectional_workspace(const BidirectionalForward& call, int capability);
FF_CUDA_EXPORT const char* bidirectional_forward(const BidirectionalForward& call, void* workspace,
                                                 void* stream);
FF_CUDA_EXPORT const char* bidirectional_path(const BidirectionalForward& call, int capability);

// Whether kernels for a type are compiled for a capability: bfloat16 needs sm_80.
FF_CUDA_EXPORT bool runs(Type type, int capability);

// Compute capability of the current device (80 for 8.0), 0 without one.
FF_CUDA_EXPORT int current_capability();

}  // namespace ff::cuda
