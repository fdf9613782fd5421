// What gradients of scores are added to: sums over query tiles, and the gradient of a mask.
#pragma once

#include "cpu/positions.h"
#include "cpu/softmax/exponential.h"

namespace ff {
namespace {

// Sums over tiles: one chain of float32 would grow wrong with their number.
inline void add(double* total, const float* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) total[i] += double(part[i]);
}

// Adds dS of a query, `stride` apart, to the gradient of the mask.
inline void add_mask_gradient(const MaskGradient& g, int64_t b, int64_t h, int64_t query,
                              const Block& block, const float* grad, int64_t stride) {
  const int64_t row = b * g.batch + h * g.head + query * g.row;
  if (g.values) {
    for (int64_t j = 0; j < block.count; ++j)
      g.values[row + block[j] * g.column] = grad[j * stride];
  } else if (g.sums) {
    for (int64_t j = 0; j < block.count; ++j)
      g.sums[row + block[j] * g.column] += double(grad[j * stride]);
  }
}

// Adds dS of a block of keys, down, and of adjacent queries to the gradient of position tables.
inline void add_position_gradient(const PositionGradient& g, int64_t b, int64_t h,
                                  const Block& queries, const Block& block, const float* grad,
                                  int64_t columns) {
  for (int64_t j = 0; j < block.count && g.sums; ++j)
    add(g.at(b, h, queries[0], block[j]), grad + j * columns, queries.count);
}

// The gradients of queries and keys are sums over dS times the scale. The sums take it where it is
// ordinary. One that is not would come too late where they leave the range of float32, and dS takes
// it, as in the formula.
struct GradientScale {
  float scores = 1.0f, sums = 1.0f;

  explicit GradientScale(float scale) { (ordinary(scale) ? sums : scores) = scale; }

  void apply(int64_t count, float* grads) const {
    if (scores == 1.0f) return;
    for (int64_t i = 0; i < count; ++i) grads[i] *= scores;
  }
};

}  // namespace
}  // namespace ff
