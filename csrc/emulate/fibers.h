// Fibers: a CUDA thread each, on a stack of its own.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define FF_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FF_ASAN 1
#endif
#endif
#ifndef FF_ASAN
#define FF_ASAN 0
#endif
#if FF_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FF_NO_ASAN __attribute__((no_sanitize_address, noinline))
#else
#define FF_NO_ASAN __attribute__((noinline))
#endif

namespace ff::cuda::emulation {
namespace {

// Red zones around locals take their room too.
constexpr size_t kStackBytes = FF_ASAN ? 256 << 10 : 64 << 10;

struct Fiber {
  void* jump[5];
  const void* stack = nullptr;  // its lowest byte; of the caller of launch() seen when it is left
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  bool entered = false;
};

Fiber* left_fiber;  // the one that the running fiber was entered from

// Maps a stack with a page below it that cannot be written; false where there is no memory.
inline bool allocate_stack(Fiber* fiber, int index) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  mprotect(memory, page, PROT_NONE);
  fiber->stack = static_cast<char*>(memory) + page;
  // Tops at different offsets in a page: at the same one they would evict each other from the
  // cache.
  fiber->stack_bytes = kStackBytes - size_t(index % 16) * 256;
  return true;
}

// What the fiber did is forgotten; it begins anew when it is next switched to.
inline void abandon(Fiber* fiber) {
  fiber->entered = false;
#if FF_ASAN
  __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
}

// To be called first by what a fiber runs.
inline void arrived([[maybe_unused]] void* fake_stack) {
#if FF_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &left_fiber->stack, &left_fiber->stack_bytes);
#endif
}

// Not _longjmp: the address sanitizer takes a call that does not return as the end of all frames of
// the stack, finds no overrun of a local array in them any more, and a switch takes 270 ns, not 75.
[[noreturn]] FF_NO_ASAN inline void jump_to(Fiber* to, void (*run)()) {
  if (to->entered) __builtin_longjmp(to->jump, 1);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = const_cast<void*>(to->stack);
  context.uc_stack.ss_size = to->stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, run, 0);
  setcontext(&context);
  __builtin_unreachable();
}

// Continues `to`, or begins it with `run`, which never returns.
FF_NO_ASAN inline void switch_fiber(Fiber* from, Fiber* to, void (*run)()) {
  left_fiber = from;
  from->entered = true;
#if FF_ASAN
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->stack_bytes);
#endif
  if (!__builtin_setjmp(from->jump)) jump_to(to, run);
  arrived(from->fake_stack);
}

}  // namespace
}  // namespace ff::cuda::emulation
