// How the emulator runs kernels: for tests, which want every legal order to give the same result.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ff::cuda::emulation {

enum class Schedule {
  kRoundRobin,  // warps in turns, one collective or barrier each: nearest to lock-step
  kGreedyWarp,  // a warp runs until all of it waits at a barrier of the block: furthest from it
};

struct Options {
  bool blocks_descending = false;
  bool warps_descending = false;  // lanes as well
  Schedule schedule = Schedule::kRoundRobin;
  bool record = false;  // keep the call sites
};

enum class Kind : uint8_t {
  kBarrier,
  kBarrierWarp,
  kShuffle,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMmaHalf,
  kMmaBFloat16,
  kCopy,
  kCommit,
  kWait,
  kFence,
};
const char* name(Kind kind);

// A call in a kernel; `file` without its folders.
struct Site {
  std::string file;
  int line;
  Kind kind;
};

void set_options(const Options& options);

// The calls met while Options::record was set, each once, and the list emptied.
std::vector<Site> take_call_sites();

// Mutations: calls on this line do nothing from now on. `file` is without its folders.
void skip_barrier(const char* file, int line);  // barrier() and barrier_warp()
void skip_wait(const char* file, int line);
void skip_nothing();

}  // namespace ff::cuda::emulation

// set_options for ctypes; schedule 1 is greedy.
extern "C" [[gnu::visibility("default")]] void ff_emulate_options(int blocks_descending,
                                                                  int schedule,
                                                                  int warps_descending);
