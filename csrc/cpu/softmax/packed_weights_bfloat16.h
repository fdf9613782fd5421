// Weights and gradients of scores as operands of bfloat16 products.
#pragma once

#include "packed_weights.h"

namespace ff {
namespace {

template <>
struct PackedWeights<BFloat16Math> {
  static constexpr Precision kPrecision = Precision::kBFloat16;

  // Over the scores: pair k / 2 stands where score k / 2 stood, which has been read by then.
  static void store(float* scores, int64_t key, int64_t columns, const Vec* weights,
                    int64_t count) {
    for (int64_t k = 0; k < count; k += 2) {
      auto* to = reinterpret_cast<uint16_t*>(scores + (key + k) / 2 * columns);
      BFloat16Math::store_pairs(to, weights[k], k + 1 < count ? weights[k + 1] : Vec::zero());
    }
  }

  static LeftColumns<BFloat16Math> by_query(const float* scores, int64_t columns) {
    return {reinterpret_cast<const uint16_t*>(scores), 2 * columns};
  }

  static void store_row(float* row, int64_t lane, Vec weights) {
    weights.store_bfloat16(reinterpret_cast<uint16_t*>(row) + lane, Vec::kLanes);
  }

  static LeftRows<BFloat16Math> by_key(const float* scores, int64_t columns) {
    return {reinterpret_cast<const uint16_t*>(scores), 2 * columns};
  }
};

template <>
struct PackedGradients<BFloat16Math> {
  static void store_pairs(int64_t count, int64_t columns, const float* from, float* pairs) {
    for (int64_t j = 0; j < count; j += 2) {
      for (int64_t lane = 0; lane < columns; lane += Vec::kLanes) {
        const float* row = from + j * columns + lane;
        const Vec next = j + 1 < count ? Vec::load(row + columns) : Vec::zero();
        auto* to = reinterpret_cast<uint16_t*>(pairs + j / 2 * columns + lane);
        BFloat16Math::store_pairs(to, Vec::load(row), next);
      }
    }
  }

  static void round_rows(int64_t count, int64_t columns, float* data) {
    for (int64_t e = 0; e < count * columns; e += columns)
      for (int64_t lane = 0; lane < columns; lane += Vec::kLanes)
        PackedWeights<BFloat16Math>::store_row(data + e, lane, Vec::load(data + e + lane));
  }

  static LeftColumns<BFloat16Math> by_query(const float*, const float* pairs, int64_t columns) {
    return PackedWeights<BFloat16Math>::by_query(pairs, columns);
  }
};

}  // namespace
}  // namespace ff
