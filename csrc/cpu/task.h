// Scratch memory of a task, and how tasks run.
#pragma once

#include <initializer_list>

#include "api.h"

namespace ff {
namespace {

// An array of `count` elements that `pointer` is to point to.
struct Part {
  template <class T>
  Part(T** pointer, int64_t count)
      : pointer(pointer),
        bytes((size_t(count) * sizeof(T) + 63) / 64 * 64),
        assign(
            [](void* at, char* memory) { *static_cast<T**>(at) = reinterpret_cast<T*>(memory); }) {}

  void* pointer;
  size_t bytes;
  void (*assign)(void*, char*);
};

// Divides the thread's scratch memory into 64-byte aligned parts.
inline bool carve(bool* out_of_memory, std::initializer_list<Part> parts) {
  size_t total = 0;
  for (const Part& part : parts) total += part.bytes;
  auto* next = reinterpret_cast<char*>(scratch(total / sizeof(float)));
  if (!next) {
    __atomic_store_n(out_of_memory, true, __ATOMIC_RELAXED);
    return false;
  }
  for (const Part& part : parts) {
    part.assign(part.pointer, next);
    next += part.bytes;
  }
  return true;
}

inline bool carve(const Attention& p, std::initializer_list<Part> parts) {
  return carve(p.out_of_memory, parts);
}

// A call as tasks of some batch entries, the last one of fewer, and of key heads: one, or all.
template <class Call>
struct HeadTasks {
  const Call* p;
  int64_t entries = 1, heads = 1;

  int64_t count() const { return (p->batch + entries - 1) / entries * (p->kv_heads / heads); }
};

// The tasks of a backward call: what is added to one sum of a mask's gradient is added by one task.
template <class Call>
HeadTasks<Call> gradient_tasks(const Call& p) {
  const MaskGradient& grad = p.grad_mask;
  return {&p, grad.joins_entries() ? p.batch : 1, grad.joins_heads() ? p.kv_heads : 1};
}

template <class Task>
void head_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& tasks = *static_cast<const HeadTasks<typename Task::Call>*>(context);
  const auto& p = *tasks.p;
  Task task(p);
  if (!task.allocate()) return;
  const int64_t beside = p.kv_heads / tasks.heads, slices = tasks.entries * tasks.heads;
  for (int64_t i = begin * slices; i < end * slices; ++i) {
    const int64_t number = i / slices, own = i % slices;
    const int64_t b = number / beside * tasks.entries + own / tasks.heads;
    if (b < p.batch) task.run(b, number % beside * tasks.heads + own % tasks.heads);
  }
}

// Runs `body` over the tasks: on this thread where the work is below about 20 us.
template <class Context>
void run(ParallelFor parallel, int64_t tasks, double flops,
         void (*body)(int64_t, int64_t, const void*), const Context& context) {
  if (tasks == 0) return;
  if (tasks == 1 || flops < 2e6) {
    body(0, tasks, &context);
  } else {
    parallel(tasks, body, &context);
  }
}

}  // namespace
}  // namespace ff
