// Scratch memory of a task, and how tasks run.
#pragma once

#include <initializer_list>

#include "kernels.h"

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
inline bool carve(const Attention& p, std::initializer_list<Part> parts) {
  size_t total = 0;
  for (const Part& part : parts) total += part.bytes;
  auto* next = reinterpret_cast<char*>(scratch(total / sizeof(float)));
  if (!next) {
    __atomic_store_n(p.out_of_memory, true, __ATOMIC_RELAXED);
    return false;
  }
  for (const Part& part : parts) {
    part.assign(part.pointer, next);
    next += part.bytes;
  }
  return true;
}

// A call as tasks of some key heads each.
template <class Call>
struct HeadTasks {
  const Call* p;
  int64_t heads;
};

template <class Task>
void head_tasks(int64_t begin, int64_t end, const void* context) {
  const auto& tasks = *static_cast<const HeadTasks<typename Task::Call>*>(context);
  const auto& p = *tasks.p;
  Task task(p);
  if (!task.allocate()) return;
  for (int64_t i = begin * tasks.heads; i < end * tasks.heads; ++i)
    task.run(i / p.kv_heads, i % p.kv_heads);
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
