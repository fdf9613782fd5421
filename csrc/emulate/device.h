// The functions of cuda/device.h on the host. Calls that can fail carry their place in the kernel.
//
// Kernels see the same bytes as different types: -fno-strict-aliasing.
//
// Not emulated: bank conflicts, registers, the order of a tensor core's roundings, memory effects
// between lanes of a warp that meet in a collective (a missing barrier_warp can pass), blocks side
// by side: one that waits for another one hangs.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"
#include "numbers.h"

#ifndef FF_ARCH
#define FF_ARCH 80
#endif
#define FF_DEVICE inline
#define FF_KERNEL(threads) static void
#define FF_KERNEL_BESIDE(threads, blocks) static void
#define FF_JOIN_(a, b) a##b
#define FF_JOIN(a, b) FF_JOIN_(a, b)
#define FF_ARCH_NAMESPACE FF_JOIN(sm, FF_ARCH)

namespace ff::cuda {
// Translation units for different capabilities may be linked together.
inline namespace FF_ARCH_NAMESPACE {

using emulation::Location;

template <class T>
constexpr bool has_mma() {
  return std::is_same_v<T, Half> || FF_ARCH >= 80;
}

FF_DEVICE int thread_index() { return emulation::position.thread; }
FF_DEVICE int lane_index() { return emulation::position.thread % 32; }
FF_DEVICE int warp_index() { return emulation::position.thread / 32; }
FF_DEVICE int64_t block_index() { return emulation::position.block; }
FF_DEVICE int64_t block_count() { return emulation::position.blocks; }

class Shared {
 public:
  template <class T>
  T* take(int count, Location where = Location::current()) {
    return static_cast<T*>(emulation::carve(taken_++, int64_t(count) * int64_t(sizeof(T)), where));
  }

 private:
  int taken_ = 0;
};

FF_DEVICE void barrier(Location where = Location::current()) { emulation::meet_block(where); }

FF_DEVICE void barrier_warp(Location where = Location::current()) {
  emulation::meet(emulation::Kind::kBarrierWarp, nullptr, emulation::compute_nothing, where);
}

FF_DEVICE void fence(Location where = Location::current()) { emulation::visit_fence(where); }

template <class T>
FF_DEVICE T shuffle(T value, int from_lane, Location where = Location::current()) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>);
  if (from_lane < 0 || from_lane > 31) emulation::fail(where, "shuffle from lane %d", from_lane);
  emulation::ShuffleOperand operand{std::bit_cast<uint32_t>(value), from_lane};
  emulation::meet(emulation::Kind::kShuffle, &operand, emulation::compute_shuffle, where);
  return std::bit_cast<T>(operand.value);
}

template <class T>
FF_DEVICE T shuffle_xor(T value, int mask, Location where = Location::current()) {
  return shuffle(value, lane_index() ^ mask, where);
}

FF_DEVICE uint32_t ballot(bool mine, Location where = Location::current()) {
  uint32_t lanes = uint32_t(mine) << lane_index();
  for (int mask = 16; mask > 0; mask /= 2) lanes |= shuffle_xor(lanes, mask, where);
  return lanes;
}

FF_DEVICE void load_matrix4(uint32_t (&r)[4], const void* row,
                            Location where = Location::current()) {
  emulation::check_shared16(row, where);
  emulation::MatrixOperand operand{r, row};
  emulation::meet(emulation::Kind::kLoadMatrix, &operand, emulation::compute_matrices, where);
}

FF_DEVICE void load_matrix4_transposed(uint32_t (&r)[4], const void* row,
                                       Location where = Location::current()) {
  emulation::check_shared16(row, where);
  emulation::MatrixOperand operand{r, row};
  emulation::meet(emulation::Kind::kLoadMatrixTransposed, &operand,
                  emulation::compute_matrices_transposed, where);
}

// The two products of m16n8k8 below sm_80 take the same fragments, and add up in the same order.
template <class T>
FF_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                   Location where = Location::current()) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  static_assert(has_mma<T>(), "BFloat16 needs sm_80");
  constexpr bool kHalf = std::is_same_v<T, Half>;
  emulation::ProductOperand operand{c, a, {b0, b1}};
  emulation::meet(kHalf ? emulation::Kind::kMmaHalf : emulation::Kind::kMmaBFloat16, &operand,
                  kHalf ? emulation::compute_product_half : emulation::compute_product_bfloat16,
                  where);
}

FF_DEVICE void copy_async16(void* shared, const void* global, bool valid,
                            Location where = Location::current()) {
  emulation::copy16(shared, global, valid, FF_ARCH >= 80, where);
}

FF_DEVICE void commit_copies(Location where = Location::current()) {
  if constexpr (FF_ARCH >= 80) emulation::commit(where);
}

template <int kPending>
FF_DEVICE void wait_copies(Location where = Location::current()) {
  static_assert(kPending >= 0);
  if constexpr (FF_ARCH >= 80) emulation::wait(kPending, where);
}

FF_DEVICE float exp2(float x) { return std::exp2(x); }
FF_DEVICE float log2(float x) { return std::log2(x); }
FF_DEVICE float reciprocal(float x) { return 1.0f / x; }
FF_DEVICE float rounded_product(float a, float b) { return a * b; }

FF_DEVICE float to_float(float x) { return x; }
FF_DEVICE float to_float(Half x) { return emulation::half_to_float(x.bits); }
FF_DEVICE float to_float(BFloat16 x) { return emulation::bfloat16_to_float(x.bits); }

template <class T>
FF_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Half>) {
    return {emulation::float_to_half(x)};
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    return {emulation::float_to_bfloat16(x)};
  }
}

template <class T>
FF_DEVICE uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class T>
FF_DEVICE float low(uint32_t both) {
  return to_float(T{uint16_t(both)});
}

template <class T>
FF_DEVICE float high(uint32_t both) {
  return to_float(T{uint16_t(both >> 16)});
}

constexpr bool has_float8() { return FF_ARCH >= 89; }

template <class T>
FF_DEVICE uint32_t unpack_float8(uint16_t two) {
  return pack<T>(emulation::float8_to_float(uint8_t(two)),
                 emulation::float8_to_float(uint8_t(two >> 8)));
}

FF_DEVICE unsigned add_atomic(unsigned* address, unsigned value) {
  const unsigned before = *address;
  *address = before + value;
  return before;
}

inline int compute_capability() { return FF_ARCH; }

// Runs a kernel to its end; null, or what is wrong, valid until this thread's next launch.
template <auto kKernel, class... Args>
const char* launch(const Launch& launch, const Args&... args) {
  const auto call = [&args...] { kKernel(args...); };
  using Call = decltype(call);
  return emulation::run(
      FF_ARCH, launch, [](const void* context) { (*static_cast<Call*>(context))(); }, &call);
}

}  // namespace FF_ARCH_NAMESPACE
}  // namespace ff::cuda
