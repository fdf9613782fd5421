// Runs kernels on the host: blocks one after another, the threads of one as fibers that take turns
// where they wait for each other.

#include "emulator.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "shared_memory.h"

namespace ff::cuda::emulation {

Position position;

namespace {

constexpr int kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
  Location where;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  bool returned = false;
  Location where;  // of the barrier that it waits at
  int group = 0;   // of copies, the one that is not yet committed
  std::vector<Copy> copies;
};

struct Warp {
  uint32_t ready, arrived;  // lanes that can run, and those in a collective
  Kind kind;
  Location where;
  void* operands[kLanes];
};

// Never destroyed: kernels may run until the process ends.
struct Emulator {
  const Launch* launch;
  void (*kernel)(const void*);
  const void* context;
  Fiber caller;
  char error[512];

  // The block.
  SharedMemory shared;
  Thread* threads[kMaxThreads];  // made as needed, kept with their stacks
  Warp warps[kMaxWarps];
  int turn;      // the warp that runs
  int returned;  // threads
  int waiting;   // threads at the barrier
  Location where_waiting;
  Thread* current;
};

Emulator* emulator;

bool same(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

void run_thread();

void resume(Thread* next) {
  Emulator& e = *emulator;
  Thread* self = e.current;
  if (next == self) return;
  e.current = next;
  position.thread = next->index;
  switch_fiber(&self->fiber, &next->fiber, run_thread);
}

void resume_caller() { switch_fiber(&emulator->current->fiber, &emulator->caller, run_thread); }

Thread* first_ready(int warp) {
  Emulator& e = *emulator;
  const uint32_t ready = e.warps[warp].ready;
  const int lane = options.warps_descending ? 31 - __builtin_clz(ready) : __builtin_ctz(ready);
  return e.threads[warp * kLanes + lane];
}

int warp_count() { return emulator->launch->threads / kLanes; }
int first_warp() { return options.warps_descending ? warp_count() - 1 : 0; }

void next_turn() {
  Emulator& e = *emulator;
  const int count = warp_count();
  e.turn = (e.turn + (options.warps_descending ? count - 1 : 1)) % count;
}

// Hands over to a thread that can run; comes back when the calling one can.
void yield() {
  Emulator& e = *emulator;
  for (int i = 0; i < warp_count(); ++i, next_turn())
    if (e.warps[e.turn].ready) return resume(first_ready(e.turn));
  if (e.returned == e.launch->threads) return resume_caller();
  for (int i = 0; i < e.launch->threads; ++i) {
    if (!e.threads[i]->returned) continue;
    position.thread = i;
    fail(e.where_waiting, "%d threads wait at the barrier, this one has returned", e.waiting);
  }
  fail(e.where_waiting, "the block waits for ever");
}

// The running lane no longer can; fails if others wait in a collective that it cannot join.
void leave(Warp* warp) {
  Emulator& e = *emulator;
  warp->ready &= ~(1u << e.current->index % kLanes);
  if (warp->ready || !warp->arrived) return;
  const int first = e.current->index / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp->arrived >> lane & 1u) continue;
    const Thread& absent = *e.threads[first + lane];
    position.thread = absent.index;
    if (absent.returned)
      fail(warp->where, "%s without this lane, which has returned", name(warp->kind));
    fail(warp->where, "%s without this lane, which waits at the barrier of line %u",
         name(warp->kind), unsigned(absent.where.line()));
  }
}

void run_thread() {
  arrived(nullptr);
  for (;;) {
    Emulator& e = *emulator;
    e.kernel(e.context);
    Thread& self = *e.current;
    if (!self.copies.empty()) fail(self.copies[0].where, "nothing waits for this copy");
    self.returned = true;
    ++e.returned;
    leave(&e.warps[self.index / kLanes]);
    if (options.schedule == Schedule::kRoundRobin && !e.warps[self.index / kLanes].ready)
      next_turn();
    yield();
  }
}

bool prepare_threads(int count) {
  Emulator& e = *emulator;
  for (int i = 0; i < count; ++i) {
    if (!e.threads[i]) e.threads[i] = new Thread();
    Thread& thread = *e.threads[i];
    thread.index = i;
    if (!thread.fiber.stack && !allocate_stack(&thread.fiber, i)) return false;
  }
  return true;
}

void run_block() {
  Emulator& e = *emulator;
  for (int i = 0; i < e.launch->threads; ++i) {
    Thread& thread = *e.threads[i];
    thread.returned = false;
    thread.group = 0;
    thread.copies.clear();
  }
  for (int w = 0; w < warp_count(); ++w) e.warps[w].ready = ~0u, e.warps[w].arrived = 0;
  e.returned = e.waiting = 0;
  e.turn = first_warp();
  e.current = first_ready(e.turn);
  position.thread = e.current->index;
  switch_fiber(&e.caller, &e.current->fiber, run_thread);
  int index = 0;
  const int64_t written = e.shared.clear(&index);
  if (written && !*e.error)
    std::snprintf(e.error, sizeof e.error,
                  "block %lld wrote byte %lld of shared array %d, which has %lld",
                  static_cast<long long>(position.block), static_cast<long long>(written), index,
                  static_cast<long long>(e.shared[index].bytes));
}

}  // namespace

void fail(Location where, const char* format, ...) {
  Emulator& e = *emulator;
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::snprintf(e.error, sizeof e.error, "%s:%u: %s (block %lld, warp %d, lane %d)",
                base_name(where.file_name()), unsigned(where.line()), text,
                static_cast<long long>(position.block), position.thread / kLanes,
                position.thread % kLanes);
  resume_caller();
  __builtin_unreachable();  // the launch abandons all threads
}

void meet(Kind kind, void* operand, void (*compute)(void* const*), Location where) {
  Emulator& e = *emulator;
  if (watched && visit(kind, where)) return;
  const int lane = e.current->index % kLanes;
  Warp& warp = e.warps[e.current->index / kLanes];
  if (!warp.arrived) {
    warp.kind = kind;
    warp.where = where;
  } else if (warp.kind != kind || !same(warp.where, where)) {
    fail(where, "%s, while other lanes are in %s of line %u", name(kind), name(warp.kind),
         unsigned(warp.where.line()));
  }
  warp.operands[lane] = operand;
  warp.arrived |= 1u << lane;
  if (warp.arrived != ~0u) {
    leave(&warp);
    return yield();
  }
  compute(warp.operands);
  warp.arrived = 0;
  warp.ready = ~0u;
  if (options.schedule == Schedule::kRoundRobin) {
    next_turn();
    yield();
  }
}

void meet_block(Location where) {
  Emulator& e = *emulator;
  if (watched && visit(Kind::kBarrier, where)) return;
  Thread& self = *e.current;
  Warp& warp = e.warps[self.index / kLanes];
  if (e.waiting == 0) {
    e.where_waiting = where;
  } else if (!same(e.where_waiting, where)) {
    fail(where, "barrier, while other threads are at that of line %u",
         unsigned(e.where_waiting.line()));
  }
  self.where = where;
  ++e.waiting;
  leave(&warp);
  if (e.waiting == e.launch->threads) {
    e.waiting = 0;
    for (int w = 0; w < warp_count(); ++w) e.warps[w].ready = ~0u;
    e.turn = first_warp();
  } else if (options.schedule == Schedule::kRoundRobin && !warp.ready) {
    next_turn();
  }
  yield();
}

void* carve(int index, int64_t bytes, Location where) {
  SharedMemory& shared = emulator->shared;
  if (bytes < 0) fail(where, "a shared array of %lld bytes", static_cast<long long>(bytes));
  if (index == shared.count()) {
    const bool fits = shared.add(bytes);
    const int given = emulator->launch->shared_bytes;
    if (!fits || shared.bytes() > given)
      fail(where, "shared array %d does not fit into the %d bytes of the launch", index, given);
  }
  if (shared[index].bytes != bytes)
    fail(where, "shared array %d has %lld bytes here, and another size for other threads", index,
         static_cast<long long>(bytes));
  return shared[index].data;
}

void check_shared16(const void* pointer, Location where) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16)
    fail(where, "shared memory that is not aligned to 16 bytes");
  if (!emulator->shared.contains16(pointer))
    fail(where, "16 bytes that are not inside a shared array");
}

void copy16(void* shared, const void* global, bool valid, bool asynchronous, Location where) {
  Emulator& e = *emulator;
  if (watched) visit(Kind::kCopy, where);
  check_shared16(shared, where);
  if (reinterpret_cast<uintptr_t>(global) % 16)
    fail(where, "a source that is not aligned to 16 bytes");
  char bytes[16] = {};
  if (valid) std::memcpy(bytes, global, 16);  // read now as well: a sanitizer then names the call
  if (!asynchronous) {
    std::memcpy(shared, bytes, 16);
    return;
  }
  std::memset(shared, kPoison, 16);
  e.current->copies.push_back({shared, valid ? global : nullptr, e.current->group, where});
}

void commit(Location where) {
  if (watched) visit(Kind::kCommit, where);
  ++emulator->current->group;
}

void wait(int pending, Location where) {
  Emulator& e = *emulator;
  if (watched && visit(Kind::kWait, where)) return;
  Thread& self = *e.current;
  size_t landed = 0;
  for (; landed < self.copies.size(); ++landed) {
    const Copy& copy = self.copies[landed];
    if (copy.group >= self.group - pending) break;
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + std::ptrdiff_t(landed));
}

void visit_fence(Location where) {
  if (watched) visit(Kind::kFence, where);
}

const char* run(int capability, const Launch& launch, void (*kernel)(const void*),
                const void* context) {
  static thread_local char error[sizeof emulator->error];
  const std::lock_guard<std::mutex> lock(mutex);
  if (!emulator) emulator = new Emulator();
  Emulator& e = *emulator;
  const int limit = shared_limit(capability);
  if (launch.blocks < 0 || launch.blocks > 0x7fffffff) return "more blocks than a grid can have";
  if (launch.threads <= 0 || launch.threads > kMaxThreads || launch.threads % kLanes)
    return "not a multiple of 32 threads, or more than 1024";
  if (launch.shared_bytes < 0 || launch.shared_bytes > limit) {
    std::snprintf(error, sizeof error, "%d bytes of shared memory, where sm_%d has %d",
                  launch.shared_bytes, capability, limit);
    return error;
  }
  e.launch = &launch;
  e.kernel = kernel;
  e.context = context;
  e.error[0] = 0;
  if (!e.shared.allocate() || !prepare_threads(launch.threads)) return "no memory to emulate";
  position.blocks = launch.blocks;
  for (int64_t i = 0; i < launch.blocks && !*e.error; ++i) {
    position.block = options.blocks_descending ? launch.blocks - 1 - i : i;
    run_block();
  }
  if (!*e.error) return nullptr;
  for (int i = 0; i < launch.threads; ++i) abandon(&e.threads[i]->fiber);
  std::memcpy(error, e.error, sizeof error);
  return error;
}

}  // namespace ff::cuda::emulation
