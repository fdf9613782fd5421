// Numbers of any element type, at any stride, as registers of float32.
#pragma once

#include <cstdint>

#include "cpu/api.h"
#include "cpu/isa/bfloat16.h"

namespace ff {
namespace {

struct Float32 {
  using Element = float;
  static float load(float value) { return value; }
  static Vec load(const float* p, int64_t count) {
    return count == Vec::kLanes ? Vec::load(p) : Vec::load(p, count);
  }
  static float store(float value) { return value; }
  static void store(float* p, Vec value, int64_t count) {
    count == Vec::kLanes ? value.store(p) : value.store(p, count);
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static float load(uint16_t value) { return bfloat16_to_float(value); }
  static Vec load(const uint16_t* p, int64_t count) { return Vec::load_bfloat16(p, count); }
  static uint16_t store(float value) { return float_to_bfloat16(value); }
  static void store(uint16_t* p, Vec value, int64_t count) { value.store_bfloat16(p, count); }
};

struct Half {
  using Element = uint16_t;
  static float load(uint16_t value) { return half_to_float(value); }
  static Vec load(const uint16_t* p, int64_t count) { return Vec::load_half(p, count); }
  static uint16_t store(float value) { return float_to_half(value); }
  static void store(uint16_t* p, Vec value, int64_t count) { value.store_half(p, count); }
};

// Calls `body` with the class above that belongs to a floating type.
template <class Body>
inline auto with_type(Type type, const Body& body) {
  if (type == Type::kBFloat16) return body(BFloat16{});
  if (type == Type::kFloat16) return body(Half{});
  return body(Float32{});
}

// Elements p[0], p[stride], ...; lanes past `count`, which is at most kLanes, are 0.
template <class T>
inline Vec load_lanes(const typename T::Element* p, int64_t stride, int64_t count) {
  if (stride == 1) return T::load(p, count);
  float lanes[Vec::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = T::load(p[i * stride]);
  return Vec::load(lanes);
}

// p[0], p[stride], ... = the first `count` lanes.
template <class T>
inline void store_lanes(typename T::Element* p, int64_t stride, int64_t count, Vec values) {
  if (stride == 1) return T::store(p, values, count);
  float lanes[Vec::kLanes];
  values.store(lanes);
  for (int64_t i = 0; i < count; ++i) p[i * stride] = T::store(lanes[i]);
}

// out[i] = element offset + i * stride of an array, for i < count; 0 up to `columns`.
inline void load(const void* data, Type type, int64_t offset, int64_t stride, int64_t count,
                 int64_t columns, float* out) {
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    const auto* from = static_cast<const typename T::Element*>(data) + offset;
    int64_t i = 0;
    for (; i < count; i += Vec::kLanes) {
      const int64_t some = count - i < Vec::kLanes ? count - i : Vec::kLanes;
      const Vec values = load_lanes<T>(from + i * stride, stride, some);
      Float32::store(out + i, values, columns - i < Vec::kLanes ? columns - i : Vec::kLanes);
    }
    for (; i < columns; ++i) out[i] = 0.0f;
  });
}

// Element offset + i * stride of an array = factor * in[i].
inline void store(void* data, Type type, int64_t offset, int64_t stride, int64_t count,
                  float factor, const float* in) {
  with_type(type, [&](auto kind) {
    using T = decltype(kind);
    auto* to = static_cast<typename T::Element*>(data) + offset;
    for (int64_t i = 0; i < count; i += Vec::kLanes) {
      const int64_t some = count - i < Vec::kLanes ? count - i : Vec::kLanes;
      const Vec values = Float32::load(in + i, some) * Vec::set(factor);
      store_lanes<T>(to + i * stride, stride, some, values);
    }
  });
}

inline void convert(const float* from, void* to, Type type, int64_t count) {
  store(to, type, 0, 1, count, 1.0f, from);
}

}  // namespace
}  // namespace ff
