// Kernels that check_emulator.cpp runs: each with a fault, and right without it.
#pragma once

#include <cmath>

#include "cuda/device.h"

namespace ff::cuda {
namespace {

constexpr int kThreads = 64, kBlocks = 3;
constexpr int kTile = 4 * kThreads;  // floats: 16 bytes for each thread

struct Params {
  const float* in;  // 1, 2, 3, ...
  float* out;
  unsigned* counter;
};

FF_DEVICE void write(const Params& p, float value) {
  p.out[block_index() * kThreads + thread_index()] = value;
}

// Reads what another warp wrote.
template <bool kBroken>
FF_KERNEL(kThreads)
read_after_write(Params p) {
  Shared shared;
  float* tile = shared.take<float>(kThreads);
  tile[thread_index()] = float(thread_index());
  if (!kBroken) barrier();
  write(p, tile[kThreads - 1 - thread_index()]);
}

// Writes the next tile while other warps read this one.
template <bool kBroken>
FF_KERNEL(kThreads)
write_after_read(Params p) {
  Shared shared;
  float* tile = shared.take<float>(kThreads);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    tile[thread_index()] = float(thread_index() * i);
    barrier();
    sum += tile[kThreads - 1 - thread_index()];
    sum = shuffle(sum, lane_index());
    if (!kBroken) barrier();
  }
  write(p, sum);
}

template <bool kBroken>
FF_KERNEL(kThreads)
neighbour_lane(Params p) {
  Shared shared;
  float* tile = shared.take<float>(kThreads);
  tile[thread_index()] = float(thread_index());
  if (!kBroken) barrier_warp();
  write(p, tile[thread_index() ^ 31]);
}

// A row of zeros as well, for which nothing is read.
template <bool kBroken>
FF_KERNEL(kThreads)
missing_wait(Params p) {
  Shared shared;
  auto* tile = shared.take<float>(kTile);
  auto* zeros = shared.take<float>(kTile);
  copy_async16(tile + 4 * thread_index(), p.in + 4 * thread_index(), true);
  copy_async16(zeros + 4 * thread_index(), nullptr, false);
  commit_copies();
  if (!kBroken) wait_copies<0>();
  write(p, tile[4 * thread_index()] + zeros[4 * thread_index() + 3]);
}

template <bool kBroken>
FF_KERNEL(kThreads)
weak_wait(Params p) {
  Shared shared;
  float* tile = shared.take<float>(2 * kTile);
  float* first = tile + 4 * thread_index();
  copy_async16(first, p.in + 4 * thread_index(), true);
  commit_copies();
  copy_async16(first + kTile, p.in + 4 * thread_index(), true);
  commit_copies();
  wait_copies<1>();
  float sum = first[0];
  wait_copies<kBroken ? 1 : 0>();
  sum += first[kTile];
  wait_copies<0>();
  write(p, sum);
}

// Copies are on their way into a tile that slower warps read.
template <bool kBroken>
FF_KERNEL(kThreads)
pipeline(Params p) {
  Shared shared;
  float* stages[2] = {shared.take<float>(kTile), shared.take<float>(kTile)};
  const auto fetch = [&](int tile) {
    const int offset = 4 * thread_index();
    if (tile < 6)
      copy_async16(stages[tile % 2] + offset, p.in + (block_index() * 8 + tile) * kTile + offset,
                   true);
    commit_copies();
  };
  float sum = 0;
  fetch(0);
  for (int tile = 0; tile < 6; ++tile) {
    fetch(tile + 1);
    wait_copies<1>();
    barrier();
    sum += stages[tile % 2][kTile - 1 - 4 * thread_index()];
    sum += shuffle_xor(0.0f, 1);
    if (!kBroken) barrier();
  }
  write(p, sum);
}

// FF_ARCH >= 80: a copy must not be seen before its wait. Below it has happened by then.
template <bool kBroken>
FF_KERNEL(kThreads)
late_copy(Params p) {
  Shared shared;
  float* tile = shared.take<float>(kTile) + 4 * thread_index();
  for (int i = 0; i < 4; ++i) tile[i] = 5;
  copy_async16(tile, p.in, true);
  commit_copies();
  const bool late = std::isnan(tile[0]);
  wait_copies<0>();
  write(p, tile[0] + float(late == (FF_ARCH >= 80)) + float(kBroken));
}

template <bool kBroken>
FF_KERNEL(kThreads)
read_past_array(Params p) {
  Shared shared;
  float* first = shared.take<float>(kThreads);
  float* second = shared.take<float>(kThreads);
  first[thread_index()] = second[thread_index()] = float(thread_index());
  write(p, first[thread_index() + kBroken]);
}

template <bool kBroken>
FF_KERNEL(kThreads)
write_past_array(Params p) {
  Shared shared;
  float* first = shared.take<float>(kThreads);
  shared.take<float>(kThreads);
  first[thread_index() + kBroken] = 1;
  write(p, float(thread_index()));
}

template <bool kBroken>
FF_KERNEL(kThreads)
write_before_array(Params p) {
  Shared shared;
  float* first = shared.take<float>(kThreads);
  first[thread_index() - kBroken] = 1;
  write(p, float(thread_index()));
}

// Only an address sanitizer sees it, and only if it still knows the frame after the switches.
template <bool kBroken>
FF_KERNEL(kThreads)
read_past_local(Params p) {
  float values[8] = {};
  values[lane_index() % 8] = 1;
  barrier();
  const float* pointer = values;
  asm volatile("" : "+r"(pointer));
  write(p, float(thread_index()) + 0 * pointer[lane_index() % 8 + 8 * kBroken]);
}

template <bool kBroken>
FF_KERNEL(kThreads)
misaligned_row(Params p) {
  Shared shared;
  Half* tile = shared.take<Half>(32 * 8 + 8);
  uint32_t r[4];
  load_matrix4(r, tile + lane_index() * 8 + (kBroken && lane_index() == 9 ? 4 : 0));
  write(p, float(thread_index()));
}

template <bool kBroken>
FF_KERNEL(kThreads)
row_outside(Params p) {
  Shared shared;
  Half* tile = shared.take<Half>(32 * 8);
  uint32_t r[4];
  load_matrix4_transposed(r, tile + lane_index() * 8 + (kBroken ? 8 : 0));
  write(p, float(thread_index()));
}

template <bool kBroken>
FF_KERNEL(kThreads)
misaligned_source(Params p) {
  Shared shared;
  float* tile = shared.take<float>(kTile) + 4 * thread_index();
  copy_async16(tile, p.in + kBroken, true);
  commit_copies();
  wait_copies<0>();
  write(p, tile[0]);
}

template <bool kBroken>
FF_KERNEL(kThreads)
early_return(Params p) {
  write(p, float(thread_index()));
  if (kBroken && thread_index() == 37) return;
  barrier();
}

template <bool kBroken>
FF_KERNEL(kThreads)
early_return_in_warp(Params p) {
  write(p, float(thread_index()));
  if (kBroken && thread_index() == 37) return;
  shuffle_xor(1, 1);
}

template <bool kBroken>
FF_KERNEL(kThreads)
divergence(Params p) {
  if (kBroken && lane_index() < 16) {
    barrier_warp();
  } else {
    shuffle_xor(1, 1);
  }
  write(p, float(thread_index()));
}

template <bool kBroken>
FF_KERNEL(kThreads)
divergent_barrier(Params p) {
  write(p, float(thread_index()));
  if (kBroken && lane_index() < 16) barrier();
  shuffle_xor(1, 1);
}

template <bool kBroken>
FF_KERNEL(kThreads)
different_barriers(Params p) {
  write(p, float(thread_index()));
  if (kBroken && warp_index() == 1) {
    barrier();
    return;
  }
  barrier();
}

template <bool kBroken>
FF_KERNEL(kThreads)
too_much_shared(Params p) {
  Shared shared;
  shared.take<float>(1);
  shared.take<float>(32 + kBroken);
  write(p, float(thread_index()));
}

template <bool kBroken>
FF_KERNEL(kThreads)
different_arrays(Params p) {
  Shared shared;
  shared.take<float>(kBroken && thread_index() == 5 ? 31 : 32);
  write(p, float(thread_index()));
}

// The last block to come adds up what all wrote; the broken one takes the order for granted.
template <bool kBroken>
FF_KERNEL(kThreads)
last_block(Params p) {
  Shared shared;
  unsigned* before = shared.take<unsigned>(1);
  write(p, float(thread_index()));
  fence();
  barrier();
  if (thread_index() == 0) *before = add_atomic(p.counter, 1u);
  barrier();
  if (kBroken ? block_index() + 1 < block_count() : *before + 1 < block_count()) return;
  float sum = 0;
  for (int b = 0; b < kBlocks; ++b) sum += p.out[b * kThreads + thread_index()];
  p.out[thread_index()] = sum;
}

template <bool kBroken>
FF_KERNEL(kThreads)
shuffles(Params p) {
  bool right = thread_index() == 32 * warp_index() + lane_index() && block_count() == kBlocks;
  for (int i = 0; i < 32; ++i) {
    right = right && shuffle_xor(thread_index(), i) == (thread_index() ^ i);
    right = right && shuffle(float(lane_index()), (lane_index() + i) % 32) ==
                         float((lane_index() + i + kBroken) % 32);
  }
  write(p, float(right));
}

}  // namespace
}  // namespace ff::cuda
