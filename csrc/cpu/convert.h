// Loads and stores of the three element types as float32.
#pragma once

#include <cstdint>

#include "bfloat16.h"
#include "kernels.h"

namespace ff {
namespace {

struct BFloat16 {
  static float load(uint16_t value) { return bfloat16_to_float(value); }
  static Vec load(const uint16_t* p) { return Vec::load_bfloat16(p); }
  static uint16_t store(float value) { return float_to_bfloat16(value); }
  static void store(uint16_t* p, Vec value) { value.store_bfloat16(p); }
};

struct Half {
  static float load(uint16_t value) { return half_to_float(value); }
  static Vec load(const uint16_t* p) { return Vec::load_half(p); }
  static uint16_t store(float value) { return float_to_half(value); }
  static void store(uint16_t* p, Vec value) { value.store_half(p); }
};

template <class T>
void load_16_bit(const uint16_t* from, int64_t stride, int64_t count, float* out,
                 int64_t out_stride) {
  int64_t i = 0;
  for (; stride == 1 && i + Vec::kLanes <= count; i += Vec::kLanes) {
    const Vec values = T::load(from + i);
    if (out_stride == 1) {
      values.store(out + i);
    } else {
      float lanes[Vec::kLanes];
      values.store(lanes);
      for (int l = 0; l < Vec::kLanes; ++l) out[(i + l) * out_stride] = lanes[l];
    }
  }
  for (; i < count; ++i) out[i * out_stride] = T::load(from[i * stride]);
}

template <class T>
void store_16_bit(uint16_t* to, int64_t stride, int64_t count, const float* in) {
  int64_t i = 0;
  for (; stride == 1 && i + Vec::kLanes <= count; i += Vec::kLanes)
    T::store(to + i, Vec::load(in + i));
  for (; i < count; ++i) to[i * stride] = T::store(in[i]);
}

// out[i * out_stride] = element offset + i * stride of an array of `type`.
inline void load(const void* data, Type type, int64_t offset, int64_t stride, int64_t count,
                 float* out, int64_t out_stride = 1) {
  if (type == Type::kFloat32) {
    const float* from = static_cast<const float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) out[i * out_stride] = from[i * stride];
  } else if (type == Type::kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    load_16_bit<BFloat16>(from, stride, count, out, out_stride);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(data) + offset;
    load_16_bit<Half>(from, stride, count, out, out_stride);
  }
}

// Element offset + i * stride of an array of `type` = in[i].
inline void store(void* data, Type type, int64_t offset, int64_t stride, int64_t count,
                  const float* in) {
  if (type == Type::kFloat32) {
    float* to = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) to[i * stride] = in[i];
  } else if (type == Type::kBFloat16) {
    store_16_bit<BFloat16>(static_cast<uint16_t*>(data) + offset, stride, count, in);
  } else {
    store_16_bit<Half>(static_cast<uint16_t*>(data) + offset, stride, count, in);
  }
}

}  // namespace
}  // namespace ff
