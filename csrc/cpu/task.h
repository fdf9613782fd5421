// Scratch memory of a task, and how tasks run.
#pragma once

#include <initializer_list>

#include "kernels.h"

namespace ff {
namespace {

struct Part {
  float** pointer;
  int64_t floats;
};

// Divides the thread's scratch memory into 64-byte aligned parts and a list of keys.
inline bool carve(const Attention& p, std::initializer_list<Part> parts, int32_t** list) {
  int64_t total = p.padding ? p.kv_len + 1 : 0;
  for (const Part& part : parts) total += (part.floats + 15) / 16 * 16;
  float* next = scratch(size_t(total));
  if (!next) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return false;
  }
  for (const Part& part : parts) {
    *part.pointer = next;
    next += (part.floats + 15) / 16 * 16;
  }
  *list = reinterpret_cast<int32_t*>(next);
  return true;
}

// Runs `body` over the tasks: on this thread where the work is below about 20 us.
template <class Context>
void run(ParallelFor parallel, int64_t tasks, double flops,
         void (*body)(int64_t, int64_t, const void*), const Context& context) {
  if (tasks < 2 || flops < 2e6) {
    body(0, tasks, &context);
  } else {
    parallel(tasks, body, &context);
  }
}

}  // namespace
}  // namespace ff
