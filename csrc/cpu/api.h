// The interface of the CPU kernels.
//
// One table of function pointers per instruction set (isa/<name>.cpp); dispatch.cpp picks the
// best one that the machine can run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "calls.h"

#define FF_EXPORT __attribute__((visibility("default")))

namespace ff {

// Runs body(begin, end, context) over disjoint parts of [0, tasks), possibly at once.
using ParallelFor = void (*)(int64_t tasks, void (*body)(int64_t, int64_t, const void*),
                             const void* context);

struct KernelTable {
  const char* isa;
  int lanes;  // float32 values in a register
  void (*attention_forward)(const AttentionForward&, ParallelFor);
  // How a forward call runs, for people, and into how many splits its keys are cut.
  const char* (*attention_path)(const AttentionForward&);
  int64_t (*attention_splits)(const AttentionForward&);
  void (*attention_backward)(const AttentionBackward&, ParallelFor);
  // A call as parts that need not know of each other: how many, and some of them. A backward call
  // has as many as key heads.
  int64_t (*attention_parts)(const AttentionForward&);
  void (*attention_part)(const AttentionForward&, int64_t begin, int64_t end);
  void (*attention_backward_part)(const AttentionBackward&, int64_t begin, int64_t end);
  void (*weight_statistics)(const WeightStatistics&, ParallelFor);
  void (*bidirectional_forward)(const BidirectionalForward&, ParallelFor);
  void (*bidirectional_backward)(const BidirectionalBackward&, ParallelFor);
  void (*linear)(const Linear&, ParallelFor);
  void (*norm)(const NormRows&, ParallelFor);
  void (*encoder_layer)(const EncoderLayer&, ParallelFor);
  void (*decoder_layer)(const DecoderLayer&, ParallelFor);
  void (*cross_attention_layer)(const CrossAttentionLayer&, ParallelFor);
  void (*cross_modal_layer)(const CrossModalLayer&, ParallelFor);
  // Does products of a type and nothing else; returns how many floating-point operations.
  double (*peak_operations)(Type, int64_t rounds);
  // to[i] = from[i] in the given floating type, to nearest even.
  void (*convert)(const float* from, void* to, Type type, int64_t count);
};

// Attention of packed sequences, each to its own keys: what the call says of one entry's rows holds
// for all of them, one sequence behind the other, and offset i says where sequence i begins. Of a
// mask and its gradient sequence i has batch entry i, and so of the gradient of sinks.
struct Sequences {
  int64_t count;
  const int64_t *q_offsets, *kv_offsets;  // count + 1 each
  bool bottom_right;                      // where the diagonal of each ends
  Prefixes prefixes = {};                 // (count)
};

FF_EXPORT void varlen_forward(const AttentionForward&, const Sequences&, ParallelFor);
FF_EXPORT void varlen_backward(const AttentionBackward&, const Sequences&, ParallelFor);

// The table in use: the best that the machine runs, or the one that FASTFUSION_CPU_ISA names.
FF_EXPORT const KernelTable& kernels();

// Chooses a table by name (nullptr or "": automatic). Returns null, or why it cannot be used.
FF_EXPORT const char* select_isa(const char* name);

// The name of the index-th compiled table, best first, or null past the end.
FF_EXPORT const char* compiled_isa(int index);

// Whether the machine can run the index-th compiled table.
FF_EXPORT bool supported_isa(int index);

// Instruction-set extensions of this machine that matter here, separated by spaces.
FF_EXPORT const char* cpu_features();

// Memory of the calling thread, 64-byte aligned, kept until the thread ends and reused by the
// next call. Null when the system has none.
float* scratch(size_t floats);

// The same, of a call as a whole: what its tasks hand to each other.
float* shared_scratch(size_t floats);

// The same, of a layer as a whole: what its steps hand to each other.
float* layer_scratch(size_t floats);

}  // namespace ff
