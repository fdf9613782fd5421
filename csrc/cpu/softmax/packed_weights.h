// How a softmax packs what it computes, weights and gradients of scores, as left operands of the
// next products. Weights stand where their scores stood, keys down and queries across:
//
//     float32      w00 w01 .. w0n            by_query: rows are queries, a step is a key (P V)
//                  w10 w11 .. w1n            by_key: rows are keys, a step is a query (P^T dO)
//
//     bfloat16     [w00 w10] [w01 w11] ..    by_query: pairs of keys, in the place of a row
//                  [w00 w01] [w02 w03] ..    by_key: pairs of queries
#pragma once

#include "exponential.h"

namespace ff {
namespace {

// How weights are kept, keys down and queries across, as the left operand of products with one row
// per query, summed over the keys (`store`, `by_query`), and of products with one row per key,
// summed over the queries (`store_row`, `by_key`).
template <class Math>
struct PackedWeights;

template <>
struct PackedWeights<Float32Math> {
  static constexpr Precision kPrecision = Precision::kFloat32;

  static void store(float* scores, int64_t key, int64_t columns, const Vec* weights,
                    int64_t count) {
    for (int64_t k = 0; k < count; ++k) weights[k].store(scores + (key + k) * columns);
  }

  static LeftColumns<Float32Math> by_query(const float* scores, int64_t columns) {
    return {scores, columns};
  }

  static void store_row(float* row, int64_t lane, Vec weights) { weights.store(row + lane); }

  static LeftRows<Float32Math> by_key(const float* scores, int64_t columns) {
    return {scores, columns};
  }
};

// P c and dS as they are computed, keys down and queries across, become left operands: in place
// for products over the queries, in another array for those over the keys.
template <class Math>
struct PackedGradients;

template <>
struct PackedGradients<Float32Math> {
  static void store_pairs(int64_t, int64_t, const float*, float*) {}
  static void round_rows(int64_t, int64_t, float*) {}

  static LeftColumns<Float32Math> by_query(const float* scores, const float*, int64_t columns) {
    return PackedWeights<Float32Math>::by_query(scores, columns);
  }
};

}  // namespace
}  // namespace ff
