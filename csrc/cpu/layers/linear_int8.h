// Linear layers with weights of 8-bit integers, packed once (pack_int8 in fastfusion/core/int8.py):
//
//     panels of 64 features   step 0   [w00 w01 w02 w03] [w10 w11 w12 w13] .. [w63,0 .. w63,3]
//                             step 1   [w04 w05 w06 w07] [w14 w15 w16 w17] .. [w63,4 .. w63,7]
//
// each w + 128, and 128 behind the last feature and the last number. Lanes are features, so none is
// idle at any number of rows. A row of x is quantised as it comes: integers in [-127, 127] times a
// scale of its own, largest |x| / 127. Sums of products are exact, and 128 times the sum of the
// row's integers has to be taken from them:
//
//     sum (w + 128) x - 128 sum x = sum w x
#pragma once

#include "linear_epilogue.h"

namespace ff {
namespace {

constexpr int64_t kInt8Round = 256;  // rows of x that are quantised before they are multiplied
constexpr int64_t kInt8Rows = 48;    // of these whose sums stay in the first cache

struct QuantizedRows {
  int64_t first, count;
  int8_t* numbers;
  int64_t row;
  float* scales;
  int32_t* offsets;  // 128 times the sum of a row
};

template <class T>
void quantize_row(const typename T::Element* x, int64_t width, int8_t* to, int64_t row,
                  float* scale, int32_t* offset) {
  constexpr int64_t kLanes = Vec::kLanes;
  // Below it the inverse of the scale overflows; such rows count as zeros.
  constexpr float kLeast = 0x1p-119f;
  const auto some = [=](int64_t k) { return width - k < kLanes ? width - k : kLanes; };
  Vec largest = Vec::zero(), zeros = Vec::zero();  // NaN where a number is not finite
  for (int64_t k = 0; k < width; k += kLanes) {
    const Vec v = T::load(x + k, some(k));
    largest = Vec::max(Vec::max(v, negative(v)), largest);
    zeros = Vec::fma(v, Vec::zero(), zeros);
  }
  float lanes[kLanes], most = 0.0f;
  largest.store(lanes);
  for (float lane : lanes) most = lane > most ? lane : most;
  const bool finite = zeros.total() == 0.0f;
  *scale = finite ? most / 127.0f : __builtin_nanf("");
  *offset = 0;
  __builtin_memset(to + width, 0, size_t(row - width));
  if (!finite || most < kLeast) {
    __builtin_memset(to, 0, size_t(width));
    return;
  }
  const Vec inverse = Vec::set(127.0f / most);
  Vec sum = Vec::zero();  // exact: below 2^24 for 65,536 numbers
  for (int64_t k = 0; k < width; k += kLanes) {
    const Vec v = Vec::round(T::load(x + k, some(k)) * inverse);
    sum = sum + v;
    Int8Math::store(to + k, v, some(k));
  }
  *offset = 128 * int32_t(sum.total());
}

struct Int8Round {
  const Linear& p;
  const QuantizedRows& rows;

  int64_t steps() const { return rows.row / kInt8Step; }
  int64_t part_panels() const { return (p.weight.part_features + kInt8Panel - 1) / kInt8Panel; }
  // Of each weight.
  int64_t panels() const { return p.features / p.weight.part_features * part_panels(); }
};

// A panel of features of the rows of a round.
struct Int8Task {
  const Int8Round& round;
  const Linear& p;
  const QuantizedRows& rows;
  float* sums;

  explicit Int8Task(const Int8Round& r) : round(r), p(r.p), rows(r.rows), sums(nullptr) {}

  bool allocate() { return carve(p.out_of_memory, {{&sums, kInt8Rows * kInt8Panel}}); }

  void run(int64_t index) {
    const Linear own = p.part(index / round.panels());
    index %= round.panels();
    const int64_t part = index / round.part_panels();
    const int64_t inside = index % round.part_panels() * kInt8Panel;
    const int64_t feature = part * p.weight.part_features + inside;
    const int64_t left = p.weight.part_features - inside;
    const int64_t count = left < kInt8Panel ? left : kInt8Panel;
    constexpr int64_t kStep = kInt8Panel * kInt8Step;
    const auto* panel = static_cast<const int8_t*>(own.weight.data) + index * round.steps() * kStep;
    for (int64_t i = 0; i < rows.count; i += kInt8Rows) {
      const int64_t some = rows.count - i < kInt8Rows ? rows.count - i : kInt8Rows;
      multiply(LeftRows<Int8Math>{rows.numbers + i * rows.row, rows.row},
               Right<Int8Math>{panel, kStep}, some, padded(count), round.steps(),
               Store{sums, kInt8Panel});
      with_type(p.type, [&](auto kind) { finish<decltype(kind)>(own, i, some, feature, count); });
    }
  }

 private:
  // From integer sums to the output.
  template <class T>
  void finish(const Linear& own, int64_t first, int64_t some, int64_t feature, int64_t count) {
    const LinearEpilogue<T> epilogue{own};
    const float* scales = own.weight.scales + feature;
    for (int64_t f = 0; f < count; f += Vec::kLanes) {
      const int64_t lanes = count - f < Vec::kLanes ? count - f : Vec::kLanes;
      const Vec scale = Float32::load(scales + f, lanes);
      for (int64_t r = 0; r < some; ++r) {
        const Vec sum = Vec::load(sums + r * kInt8Panel + f);
        const Vec exact = Int8Math::to_float(sum, rows.offsets[first + r]);
        epilogue(rows.first + first + r, feature + f, lanes,
                 exact * (Vec::set(rows.scales[first + r]) * scale));
      }
    }
  }
};

inline void linear_int8(const Linear& p, ParallelFor parallel) {
  static_assert(Int8Math::kDepth == kInt8Step);
  const int64_t row = (p.width + kInt8Step - 1) / kInt8Step * kInt8Step;
  const int64_t most = p.rows < kInt8Round ? p.rows : kInt8Round;
  float* memory = shared_scratch(size_t(most * (2 + row / 4)));
  if (!memory) {
    *p.out_of_memory = true;
    return;
  }
  auto* offsets = reinterpret_cast<int32_t*>(memory + most);
  auto* numbers = reinterpret_cast<int8_t*>(memory + 2 * most);
  const auto quantize = [](int64_t begin, int64_t end, const void* context) {
    // clang 14 lets no lambda see a structured binding.
    const auto& round = *static_cast<const Int8Round*>(context);
    const Linear& p = round.p;
    const QuantizedRows& rows = round.rows;
    with_type(p.type, [&](auto kind) {
      using T = decltype(kind);
      const auto* x = static_cast<const typename T::Element*>(p.x) + rows.first * p.x_row;
      for (int64_t i = begin; i < end; ++i)
        quantize_row<T>(x + i * p.x_row, p.width, rows.numbers + i * rows.row, rows.row,
                        rows.scales + i, rows.offsets + i);
    });
  };
  const auto multiply = [](int64_t begin, int64_t end, const void* context) {
    Int8Task task(*static_cast<const Int8Round*>(context));
    if (!task.allocate()) return;
    for (int64_t i = begin; i < end; ++i) task.run(i);
  };
  for (int64_t first = 0; first < p.rows; first += kInt8Round) {
    const int64_t left = p.rows - first, count = left < kInt8Round ? left : kInt8Round;
    const QuantizedRows rows{first, count, numbers, row, memory, offsets};
    const Int8Round round{p, rows};
    const double size = double(count) * double(p.width);
    run(parallel, count, 16.0 * size, quantize, round);
    // A product of integers takes a quarter of the time of one of float32.
    run(parallel, p.count * round.panels(), 0.5 * size * double(p.count * p.features), multiply,
        round);
  }
}

}  // namespace
}  // namespace ff
