// Layer norm (Ba, Kiros and Hinton, 2016) and RMS norm (Zhang and Sennrich, 2019), a row at a time.
#pragma once

#include "cpu/gemm/convert.h"
#include "cpu/task.h"

namespace ff {
namespace {

// A row of x + residual, as registers.
template <class T>
struct NormRow {
  using Element = typename T::Element;
  const Element *x, *residual;
  int64_t width;

  NormRow(const NormRows& p, int64_t i)
      : x(static_cast<const Element*>(p.x) + i * p.x_row),
        residual(p.residual ? static_cast<const Element*>(p.residual) + i * p.residual_row
                            : nullptr),
        width(p.width) {}

  Vec load(int64_t k, int64_t some) const {
    const Vec v = T::load(x + k, some);
    return residual ? v + T::load(residual + k, some) : v;
  }

  // body(k, some) for the registers of the row: `some` numbers from the k-th on.
  template <class Body>
  void each(const Body& body) const {
    int64_t k = 0;
    for (; k + Vec::kLanes <= width; k += Vec::kLanes) body(k, int64_t{Vec::kLanes});
    if (k < width) body(k, width - k);
  }
};

template <class T>
void norm_row(const NormRows& p, int64_t i) {
  using Element = typename T::Element;
  const NormRow<T> row(p, i);
  const auto* weight = static_cast<const Element*>(p.norm.weight);
  const auto* bias = static_cast<const Element*>(p.norm.bias);
  auto* out = static_cast<Element*>(p.out) + i * p.out_row;
  const float width = float(p.width);

  Vec mean = Vec::zero();
  if (!p.norm.rms) {
    Vec sum = Vec::zero();
    row.each([&](int64_t k, int64_t some) { sum = sum + row.load(k, some); });
    mean = Vec::set(sum.total() / width);
  }
  // Around the mean: the difference of two squares would cancel.
  Vec squares = Vec::zero();
  row.each([&](int64_t k, int64_t some) {
    Vec distance = row.load(k, some) - mean;
    if (some < Vec::kLanes) {  // lanes after the end stay out
      float lanes[Vec::kLanes];
      distance.store(lanes);
      distance = Vec::load(lanes, some);
    }
    squares = Vec::fma(distance, distance, squares);
  });
  const Vec factor = Vec::set(1.0f / __builtin_sqrtf(squares.total() / width + p.norm.eps));
  row.each([&](int64_t k, int64_t some) {
    Vec y = (row.load(k, some) - mean) * factor;
    if (weight) y = y * T::load(weight + k, some);
    if (bias) y = y + T::load(bias + k, some);
    T::store(out + k, y, some);
  });
}

// `out` may be `x`.
inline void norm(const NormRows& p, ParallelFor parallel) {
  const auto some = [](int64_t begin, int64_t end, const void* context) {
    const auto& p = *static_cast<const NormRows*>(context);
    with_type(p.type, [&](auto kind) {
      for (int64_t i = begin; i < end; ++i) norm_row<decltype(kind)>(p, i);
    });
  };
  run(parallel, p.rows, 16.0 * double(p.rows) * double(p.width), some, p);
}

}  // namespace
}  // namespace ff
