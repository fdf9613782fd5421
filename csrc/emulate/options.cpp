// The order that kernels run in, and the calls in them that are listed or left out.

#include <cstring>
#include <utility>

#include "emulator.h"

namespace ff::cuda::emulation {

std::mutex mutex;
Options options;
bool watched;

namespace {

const char* const kNames[] = {
    "barrier",  "barrier_warp", "shuffle",      "load_matrix4",  "load_matrix4_transposed",
    "mma half", "mma bfloat16", "copy_async16", "commit_copies", "wait_copies",
    "fence",
};

struct Skip {
  std::string file;
  int line;
  bool wait;
};

struct Calls {
  std::vector<Site> sites;
  std::vector<Skip> skips;
};

// Never destroyed: kernels may run until the process ends. With the mutex held.
Calls& calls() {
  static Calls* const instance = new Calls();
  return *instance;
}

void skip(const char* file, int line, bool wait) {
  const std::lock_guard<std::mutex> lock(mutex);
  calls().skips.push_back({file, line, wait});
  watched = true;
}

}  // namespace

const char* name(Kind kind) { return kNames[int(kind)]; }

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool visit(Kind kind, Location where) {
  const int line = int(where.line());
  const char* file = base_name(where.file_name());
  if (options.record) {
    bool known = false;
    for (const Site& site : calls().sites)
      known = known || (site.line == line && site.kind == kind && site.file == file);
    if (!known) calls().sites.push_back({file, line, kind});
  }
  const bool wait = kind == Kind::kWait;
  if (!wait && kind != Kind::kBarrier && kind != Kind::kBarrierWarp) return false;
  for (const Skip& skip : calls().skips)
    if (skip.line == line && skip.wait == wait && skip.file == file) return true;
  return false;
}

void set_options(const Options& wanted) {
  const std::lock_guard<std::mutex> lock(mutex);
  options = wanted;
  watched = options.record || !calls().skips.empty();
}

std::vector<Site> take_call_sites() {
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(calls().sites, {});
}

void skip_barrier(const char* file, int line) { skip(file, line, false); }
void skip_wait(const char* file, int line) { skip(file, line, true); }

void skip_nothing() {
  const std::lock_guard<std::mutex> lock(mutex);
  calls().skips.clear();
  watched = options.record;
}

}  // namespace ff::cuda::emulation

void ff_emulate_options(int blocks_descending, int schedule, int warps_descending) {
  ff::cuda::emulation::Options options;
  options.blocks_descending = blocks_descending != 0;
  options.warps_descending = warps_descending != 0;
  options.schedule = ff::cuda::emulation::Schedule(schedule != 0);
  ff::cuda::emulation::set_options(options);
}
