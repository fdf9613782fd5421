// The interface of the CPU kernels: plain pointers, sizes and strides, no framework.
//
// One table of function pointers per instruction set (isa_<name>.cpp); dispatch.cpp picks the
// best one that the machine can run. Letters: B batch, H heads, G kv heads, Lq query length,
// Lk key length, D head dim, Dv value dim. Strides count elements and may be 0 or any other number.
#pragma once

#include <cstddef>
#include <cstdint>

#define FF_EXPORT __attribute__((visibility("default")))

namespace ff {

enum class Type : int32_t { kFloat32, kBFloat16, kFloat16, kBool };

// A (B, heads, rows, columns) operand somewhere in memory.
struct View {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct MutableView {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// Runs body(begin, end, context) over disjoint parts of [0, tasks), possibly at once.
using ParallelFor = void (*)(int64_t tasks, void (*body)(int64_t, int64_t, const void*),
                             const void* context);

struct Attention {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  Type type;   // of query, key, value and out
  View query;  // (B, H, Lq, D)
  View key;    // (B, G, Lk, D); head h reads key head h / (H / G)
  View value;  // (B, G, Lk, Dv)

  View mask;  // (B, H, Lq, Lk) by strides of 0 where it broadcasts; no data: none
  Type mask_type = Type::kBool;
  const bool* padding = nullptr;  // (B, Lk), true = the key is never read
  int64_t padding_batch = 0, padding_column = 0;

  float scale;
  bool causal;

  bool dropout = false;
  int64_t dropout_stream = 0;  // 1: this is the softmax over queries of a bidirectional call
  uint64_t seed = 0;
  uint64_t threshold = 0;  // a score is kept where its 32-bit word reaches this
  float keep_scale = 1.0f;

  bool* out_of_memory;  // set where a thread finds no scratch memory: the results are then void
};

struct AttentionForward : Attention {
  MutableView out;       // (B, H, Lq, Dv)
  float* lse = nullptr;  // (B, H, Lq) contiguous, or none
};

struct AttentionBackward : Attention {
  View grad_out;                    // (B, H, Lq, Dv)
  const float* grad_lse = nullptr;  // (B, H, Lq) by strides, or none
  int64_t grad_lse_batch = 0, grad_lse_head = 0, grad_lse_row = 0;
  MutableView grad_query, grad_key, grad_value;
  // One of the two, zeroed by the caller, or neither where it is not wanted. A mask that broadcasts
  // has strides of 0 here and sums over the scores that share an entry: possibly millions.
  float* grad_mask = nullptr;
  double* grad_mask_sums = nullptr;
  int64_t grad_mask_batch = 0, grad_mask_head = 0, grad_mask_row = 0, grad_mask_column = 0;
};

struct KernelTable {
  const char* isa;
  int lanes;  // float32 values in a register
  void (*attention_forward)(const AttentionForward&, ParallelFor);
  const char* (*attention_path)(Type, int64_t q_len);  // how a forward call runs, for people
  void (*attention_backward)(const AttentionBackward&, ParallelFor);
  // to[i] = from[i] in the given floating type, to nearest even.
  void (*convert)(const float* from, void* to, Type type, int64_t count);
};

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

}  // namespace ff
