// Numbers of 16 bits, and of 8, one at a time. A NaN becomes 0x7fff, as on the device.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ff::cuda::emulation {
namespace {

inline float half_to_float(uint16_t value) {
  const uint32_t sign = (value & 0x8000u) << 16, size = value & 0x7fffu;
  if (size < 0x400u) {  // denormal, in units of 2^-24
    const float tiny = float(size) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(tiny) | sign);
  }
  const uint32_t exponent = size >= 0x7c00u ? 2 * 0x38000000u : 0x38000000u;
  return std::bit_cast<float>(sign | ((size << 13) + exponent));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), size = bits & 0x7fffffffu;
  const auto sign = uint16_t(bits >> 16 & 0x8000u);
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x477ff000u) return sign | 0x7c00;  // from 65520 on
  if (size < 0x38800000u) {                       // denormal: the bits of 0.5 are worth 2^-24
    const float aligned = std::bit_cast<float>(size) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000u));
  }
  return uint16_t(sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13));
}

inline float bfloat16_to_float(uint16_t value) {
  return std::bit_cast<float>(uint32_t(value) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Of E4M3, which has no infinities.
inline float float8_to_float(uint8_t value) {
  const int size = value & 0x7f, exponent = size >> 3, digits = size & 7;
  const float magnitude = size == 0x7f   ? std::numeric_limits<float>::quiet_NaN()
                          : exponent > 0 ? std::ldexp(float(8 + digits), exponent - 10)
                                         : std::ldexp(float(digits), -9);
  return value & 0x80 ? -magnitude : magnitude;
}

}  // namespace
}  // namespace ff::cuda::emulation
