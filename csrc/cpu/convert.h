// Loads and stores of the three element types as float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace ff {
namespace {

inline float bfloat16_to_float(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// To nearest, ties to even; a NaN stays one (adding to its mantissa could overflow).
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// out[i * out_stride] = element offset + i * stride of an array of `type`.
inline void load(const void* data, Type type, int64_t offset, int64_t stride, int64_t count,
                 float* out, int64_t out_stride = 1) {
  if (type == Type::kFloat32) {
    const float* from = static_cast<const float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i * out_stride] = from[i * stride];
  } else if (type == Type::kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    if (stride == 1 && out_stride == 1) {  // the compiler vectorises this one
      for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(from[i]);
      return;
    }
    for (int64_t i = 0; i < count; ++i) out[i * out_stride] = bfloat16_to_float(from[i * stride]);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i * out_stride] = half_to_float(from[i * stride]);
  }
}

// Element offset + i * stride of an array of `type` = in[i].
inline void store(void* data, Type type, int64_t offset, int64_t stride, int64_t count,
                  const float* in) {
  if (type == Type::kFloat32) {
    float* to = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i * stride] = in[i];
  } else if (type == Type::kBFloat16) {
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i * stride] = float_to_bfloat16(in[i]);
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i * stride] = float_to_half(in[i]);
  }
}

}  // namespace
}  // namespace ff
