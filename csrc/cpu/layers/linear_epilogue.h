// What becomes of the sums of a linear layer.
#pragma once

#include "activations.h"
#include "cpu/gemm/packing.h"
#include "cpu/task.h"

namespace ff {
namespace {

// From the sums of a row to the output.
template <class T>
struct LinearEpilogue {
  const Linear& p;

  void operator()(int64_t row, int64_t feature, int64_t count, Vec sum) const {
    using Element = typename T::Element;
    if (p.weight.bias)
      sum = sum + T::load(static_cast<const Element*>(p.weight.bias) + feature, count);
    sum = activate(p.activation, sum);
    if (p.residual) {
      const auto* from = static_cast<const Element*>(p.residual) + row * p.residual_row + feature;
      sum = sum + T::load(from, count);
    }
    T::store(static_cast<Element*>(p.out) + row * p.out_row + feature, sum, count);
  }
};

}  // namespace
}  // namespace ff
