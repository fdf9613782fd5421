// What kernels, their launchers and the emulator share: plain types and numbers.
#pragma once

#include <cstdint>

namespace ff::cuda {

// How 16-bit values lie in memory; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Arrays of shared memory begin at multiples of this: a row of all 32 banks.
constexpr int kSharedAlignment = 128;

// What an array takes of Launch::shared_bytes.
template <class T>
constexpr int shared_bytes(int count) {
  return (count * int(sizeof(T)) + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
}

// `blocks` may be 0; `threads` is a multiple of 32; `stream` is a cudaStream_t.
struct Launch {
  int64_t blocks;
  int threads;
  int shared_bytes;
  void* stream;
};

// Bytes of shared memory that a block can have; of an unknown device what every one gives.
constexpr int shared_limit(int capability) {
  switch (capability) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 << 10;
    case 90:
    case 100:
    case 103:
    case 110:
      return 227 << 10;
    default:
      return 48 << 10;
  }
}

}  // namespace ff::cuda
