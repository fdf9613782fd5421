// What emulate/device.h calls; independent of FF_ARCH.
#pragma once

#include <cstdint>
#include <mutex>
#include <source_location>

#include "cuda/launch.h"
#include "options.h"

namespace ff::cuda::emulation {

#ifdef __cpp_lib_source_location
using Location = std::source_location;
#else  // clang before version 16
struct Location {
  const char* file;
  int at_line, at_column;

  static Location current(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                          int column = __builtin_COLUMN()) {
    return {file, line, column};
  }
  const char* file_name() const { return file; }
  int line() const { return at_line; }
  int column() const { return at_column; }
};
#endif

// Of the CUDA thread that runs.
struct Position {
  int thread;
  int64_t block, blocks;
};
extern Position position;

// Launches hold it, and it guards what options.cpp keeps.
extern std::mutex mutex;
extern Options options;
extern bool watched;  // calls are to be shown to visit()

// Lists a call where that is wanted; true where it is to be left out.
bool visit(Kind kind, Location where);
const char* base_name(const char* path);

// Ends the launch with an error, at a call of the running thread.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(Location where, const char* format, ...);

// Meets the other lanes of the warp. The last to come runs `compute` over the operands of all.
void meet(Kind kind, void* operand, void (*compute)(void* const* operands), Location where);
void meet_block(Location where);

// Array `index` of the block's shared memory: made by the first thread that asks for it.
void* carve(int index, int64_t bytes, Location where);
// Fails unless the 16 bytes are aligned and inside one array.
void check_shared16(const void* pointer, Location where);

// Asynchronous copies land at the wait; before it their target holds NaN, whoever reads it.
void copy16(void* shared, const void* global, bool valid, bool asynchronous, Location where);
void commit(Location where);
void wait(int pending, Location where);
void visit_fence(Location where);

const char* run(int capability, const Launch& launch, void (*kernel)(const void* context),
                const void* context);

// Computations of collectives, over pointers to these.
struct ShuffleOperand {
  uint32_t value;
  int from;
};
struct MatrixOperand {
  uint32_t* result;  // [4]
  const void* row;
};
struct ProductOperand {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};
void compute_nothing(void* const* operands);
void compute_shuffle(void* const* operands);
void compute_matrices(void* const* operands);
void compute_matrices_transposed(void* const* operands);
void compute_product_half(void* const* operands);
void compute_product_bfloat16(void* const* operands);

}  // namespace ff::cuda::emulation
