// y = activation(x W^T + bias) + residual, with W where its owner keeps it: (features, width), read
// in place and never packed, so that no copy of it can be stale.
//
// A row of x is computed in one of two ways:
//
//   outer products:  x, transposed  W, in place         sums
//                    [width][rows]  [features][width]   [features][rows]
//                    Lanes are rows of x, and a number of W is broadcast over them, as K's are in
//                    attention: the faster way where the registers are full.
//   inner products:  x, in place    W, in place         sums
//                    [rows][width]  [features][width]   [rows][features]
//                    Lanes run along the width of both and are added up at the end: no lane is idle
//                    at any number of rows.
//
// Which of them is a function of a row's place in its own sequence and of the sequence's length,
// never of batch mates or threads, on which a row's bits must not depend.
#pragma once

#include "activations.h"
#include "cpu/gemm/packing.h"
#include "cpu/task.h"

namespace ff {
namespace {

constexpr int64_t kLinearPanel = 4 * Vec::kLanes;   // rows of x that are transposed side by side
constexpr int64_t kLinearRound = 4 * kLinearPanel;  // rows of either way between two looks at W
constexpr int64_t kLinearFeatures = 48;             // features that a task computes
constexpr int64_t kLinearChain = 128;  // steps of one chain of sums: longer ones lose accuracy

// How many rows of a sequence of this length take outer products: the first ones.
inline int64_t outer_rows(int64_t length) {
  constexpr int64_t kLanes = Vec::kLanes;
  const int64_t rest = length % kLanes;
  // Registers that are three quarters full are still as fast as inner products.
  return 4 * rest >= 3 * kLanes ? length : length - rest;
}

// From the sums of a row to the output.
template <class T>
struct LinearEpilogue {
  const Linear& p;

  void operator()(int64_t row, int64_t feature, int64_t count, Vec sum) const {
    using Element = typename T::Element;
    if (p.bias) sum = sum + T::load(static_cast<const Element*>(p.bias) + feature, count);
    sum = activate(p.activation, sum);
    if (p.residual) {
      const auto* from = static_cast<const Element*>(p.residual) + row * p.residual_row + feature;
      sum = sum + T::load(from, count);
    }
    T::store(static_cast<Element*>(p.out) + row * p.out_row + feature, sum, count);
  }
};

// sums[feature][row] of the rows of a block, to the output.
template <class Epilogue>
void store_transposed(const Epilogue& epilogue, const Block& block, int64_t first, int64_t features,
                      const float* sums) {
  constexpr int64_t kLanes = Vec::kLanes;
  const int64_t columns = padded(block.count);
  for (int64_t f = 0; f < features; f += kLanes) {
    const int64_t some = features - f < kLanes ? features - f : kLanes;
    for (int64_t i = 0; i < block.count; i += kLanes) {
      Vec tile[kLanes];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kLanes; ++r)
        tile[r] = r < some ? Vec::load(sums + (f + r) * columns + i) : Vec::zero();
      Vec::transpose(tile);
      const int64_t rows = block.count - i < kLanes ? block.count - i : kLanes;
      for (int64_t r = 0; r < rows; ++r) epilogue(block[i + r], first + f, some, tile[r]);
    }
  }
}

// Rows and features of a register tile of inner products.
constexpr int kInnerRows = Vec::kRegisters == 32 ? 3 : 2;
constexpr int kInnerFeatures = Vec::kLanes / 2;

// The inner products of kRows rows of x with kInnerFeatures rows of W: to[r * kInnerFeatures + f],
// in whole registers.
template <class Math, int kRows>
__attribute__((noinline)) void multiply_inner(const typename Math::Element* const* x,
                                              const typename Math::Element* const* weight,
                                              int64_t width, float* to) {
  constexpr int kFeatures = kInnerFeatures;
  constexpr int64_t kStep = Vec::kLanes * Math::kDepth;
  Vec sum[(kRows + 1) / 2 * Vec::kLanes];
#pragma GCC unroll 32
  for (Vec& s : sum) s = Vec::zero();
  const auto add = [&](const auto& load) __attribute__((always_inline)) {
    typename Math::Operand lanes[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) lanes[r] = load(x[r]);
#pragma GCC unroll 8
    for (int f = 0; f < kFeatures; ++f) {
      const typename Math::Operand w = load(weight[f]);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
        sum[r * kFeatures + f] = Math::add_product(lanes[r], w, sum[r * kFeatures + f]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= width; k += kStep)
    add([&](const auto* row) __attribute__((always_inline)) { return Math::load(row + k); });
  if (k < width) {
    const int64_t some = (width - k + Math::kDepth - 1) / Math::kDepth;
    add([&](const auto* row) __attribute__((always_inline)) { return Math::load(row + k, some); });
  }
#pragma GCC unroll 2
  for (int i = 0; i < (kRows + 1) / 2; ++i)
    Vec::totals(sum + i * Vec::kLanes).store(to + i * Vec::kLanes);
}

// The rows of a round, and x as their ways want it.
template <class Math>
struct LinearRows {
  Block outer, inner;
  float* transposed;       // panels of kLinearPanel rows
  LeftRows<Math> inner_x;  // its first row is the first of `inner`

  static int64_t panel_size(const Linear& p) { return kLinearPanel * (p.width + 1); }

  int64_t panels() const { return (outer.count + kLinearPanel - 1) / kLinearPanel; }
  Block panel(int64_t index) const { return part(outer, index); }

  // The index-th kLinearPanel rows.
  static Block part(const Block& rows, int64_t index) {
    const int64_t first = index * kLinearPanel, left = rows.count - first;
    return {rows.positions, rows.first + first, left < kLinearPanel ? left : kLinearPanel};
  }
};

// A matrix of rows, as operands take it.
inline Slice matrix(const void* data, Type type, int64_t row) {
  return Slice({data, 0, 0, row, 1}, type, 0, 0);
}

// kLinearFeatures features of some rows.
template <class Math>
struct LinearTask {
  const Linear& p;
  const LinearRows<Math>& rows;
  float *sums, *copy;

  bool allocate() {
    const bool in_place = Math::kDepth > 1 ? p.width % 2 == 0 : p.type == Type::kFloat32;
    return carve(p.out_of_memory, {{&sums, kLinearFeatures * kLinearPanel},
                                   {&copy, in_place ? 0 : kLinearFeatures * (p.width + 1)}});
  }

  void run(int64_t index) {
    const int64_t first = index * kLinearFeatures, left = p.features - first;
    const int64_t features = left < kLinearFeatures ? left : kLinearFeatures;
    const Block block{{p.features, nullptr}, first, features};
    const auto weight =
        Packing<Math>::rows(matrix(p.weight, p.type, p.weight_row), block, p.width, copy);
    with_type(p.type, [&](auto kind) {
      const LinearEpilogue<decltype(kind)> epilogue{p};
      for (int64_t i = 0; i < rows.panels(); ++i) panel(epilogue, weight, first, features, i);
      for (int64_t i = 0; i * kLinearPanel < rows.inner.count; ++i)
        inner(epilogue, weight, first, features, i);
    });
  }

 private:
  template <class Epilogue>
  void panel(const Epilogue& epilogue, const LeftRows<Math>& weight, int64_t first,
             int64_t features, int64_t index) {
    const Block block = rows.panel(index);
    const int64_t columns = padded(block.count);
    const auto* x = reinterpret_cast<const typename Math::Element*>(
        rows.transposed + index * LinearRows<Math>::panel_size(p));
    // A register tile's rows of W from end to end: cut into parts first, a call of 20 rows over 9
    // MB of weights takes 1.4 times as long, since nobody guesses which lines come next.
    const int64_t vectors = columns / Vec::kLanes;
    // More than eight rows at a multiple of 4 KB compete for the eight ways of the first cache.
    const bool compete = weight.row * int64_t(sizeof(typename Math::Element)) % 4096 == 0;
    const int64_t tile = vectors == 4   ? kRegisterTileRows<4>
                         : vectors == 3 ? kRegisterTileRows<3>
                         : compete      ? kRegisterTileRows<2> / 2
                                        : kRegisterTileRows<2>;
    for (int64_t f = 0; f < features; f += tile)
      multiply_in_parts(LeftRows<Math>{weight.data + f * weight.row, weight.row},
                        Right<Math>{x, columns * Math::kDepth},
                        features - f < tile ? features - f : tile, columns,
                        Packing<Math>::steps(p.width), sums + f * columns, kLinearChain);
    store_transposed(epilogue, block, first, features, sums);
  }

  template <class Epilogue>
  void inner(const Epilogue& epilogue, const LeftRows<Math>& weight, int64_t first,
             int64_t features, int64_t index) {
    const Block block = LinearRows<Math>::part(rows.inner, index);
    using Element = typename Math::Element;
    for (int64_t f = 0; f < features; f += kInnerFeatures) {
      const Element* w[kInnerFeatures];  // the last one again behind the end
      for (int i = 0; i < kInnerFeatures; ++i)
        w[i] = weight.data + (f + i < features ? f + i : features - 1) * weight.row;
      for (int64_t i = 0; i < block.count; i += kInnerRows) {
        const int64_t some = block.count - i < kInnerRows ? block.count - i : kInnerRows;
        const Element* x[kInnerRows];
        for (int64_t r = 0; r < some; ++r)
          x[r] = rows.inner_x.data + (index * kLinearPanel + i + r) * rows.inner_x.row;
        float tile[2 * Vec::kLanes];
        if (some == 1) multiply_inner<Math, 1>(x, w, p.width, tile);
        if (some == 2) multiply_inner<Math, 2>(x, w, p.width, tile);
        if constexpr (kInnerRows == 3) {
          if (some == 3) multiply_inner<Math, 3>(x, w, p.width, tile);
        }
        for (int64_t r = 0; r < some; ++r)
          __builtin_memcpy(sums + (i + r) * kLinearFeatures + f, tile + r * kInnerFeatures,
                           kInnerFeatures * sizeof(float));
      }
    }
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t f = 0; f < features; f += Vec::kLanes) {
        const int64_t some = features - f < Vec::kLanes ? features - f : Vec::kLanes;
        epilogue(block[i], first + f, some, Vec::load(sums + i * kLinearFeatures + f));
      }
  }
};

template <class Math>
void linear_round(const Linear& p, const LinearRows<Math>& rows, ParallelFor parallel) {
  struct Round {
    const Linear& p;
    const LinearRows<Math>& rows;
  } round{p, rows};
  const auto transpose = [](int64_t begin, int64_t end, const void* context) {
    const auto& [p, rows] = *static_cast<const Round*>(context);
    const Slice x = matrix(p.x, p.type, p.x_row);
    for (int64_t i = begin; i < end; ++i)
      Packing<Math>::lanes(x, rows.panel(i), p.width, 1.0f,
                           rows.transposed + i * LinearRows<Math>::panel_size(p));
  };
  const auto multiply = [](int64_t begin, int64_t end, const void* context) {
    const auto& [p, rows] = *static_cast<const Round*>(context);
    LinearTask<Math> task{p, rows, nullptr, nullptr};
    if (!task.allocate()) return;
    for (int64_t i = begin; i < end; ++i) task.run(i);
  };
  const auto numbers = [&](const Block& some) { return double(some.count) * double(p.width); };
  // Transposing a number takes about as long as eight products.
  run(parallel, rows.panels(), 16.0 * numbers(rows.outer), transpose, round);
  run(parallel, (p.features + kLinearFeatures - 1) / kLinearFeatures,
      2.0 * (numbers(rows.outer) + numbers(rows.inner)) * double(p.features), multiply, round);
}

template <class Math>
void linear_rows(const Linear& p, ParallelFor parallel) {
  if (p.rows == 0 || p.features == 0) return;
  const int64_t first = outer_rows(p.length), count = p.rows / p.length * first;
  Positions outer{count, nullptr}, inner{p.rows - count, nullptr};
  const bool mixed = first > 0 && first < p.length;
  const auto most = [](int64_t n) { return n < kLinearRound ? n : kLinearRound; };
  const int64_t panels = (most(outer.count) + kLinearPanel - 1) / kLinearPanel;
  const int64_t transposed = panels * LinearRows<Math>::panel_size(p);
  const int64_t copied = most(inner.count) * (p.width + 1);
  float* memory = shared_scratch(size_t(transposed + copied + (mixed ? p.rows : 0)));
  if (!memory) {
    *p.out_of_memory = true;
    return;
  }
  if (mixed) {
    auto* list = reinterpret_cast<int32_t*>(memory + transposed + copied);
    outer.list = list, inner.list = list + count;
    int32_t *first_rows = list, *others = list + count;
    for (int64_t i = 0; i < p.rows; ++i)
      *(i % p.length < first ? first_rows : others)++ = int32_t(i);
  }
  for (int64_t i = 0; i < outer.count || i < inner.count; i += kLinearRound) {
    const auto some = [&](const Positions& rows) {
      return i < rows.count ? block_at(rows, i, kLinearRound) : Block{rows, 0, 0};
    };
    LinearRows<Math> rows{some(outer), some(inner), memory, {}};
    if (rows.inner.count > 0) {
      rows.inner_x = Packing<Math>::rows(matrix(p.x, p.type, p.x_row), rows.inner, p.width,
                                         memory + transposed);
    }
    linear_round(p, rows, parallel);
  }
}

template <class HalfMath>
void linear(const Linear& p, ParallelFor parallel) {
  if (HalfMath::kDepth > 1 && p.type == Type::kBFloat16) {
    linear_rows<HalfMath>(p, parallel);
  } else {
    linear_rows<Float32Math>(p, parallel);
  }
}

}  // namespace
}  // namespace ff
