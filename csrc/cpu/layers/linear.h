// y = activation(x W^T + bias) + residual, with W where its owner keeps it: (features, width), read
// in place and never packed, so that no copy of it can be stale. 8-bit integers: linear_int8.h.
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

#include "linear_epilogue.h"
#include "linear_int8.h"

namespace ff {
namespace {

constexpr int64_t kLinearPanel = 4 * Vec::kLanes;   // rows of x that are transposed side by side
constexpr int64_t kLinearRound = 4 * kLinearPanel;  // rows of either way between two looks at W
constexpr int64_t kLinearFeatures = 56;             // features that a task computes
constexpr int64_t kLinearChain = 128;  // steps of one chain of sums: longer ones lose accuracy

// How many rows of a sequence of this length take outer products: the first ones.
inline int64_t outer_rows(int64_t length) {
  constexpr int64_t kLanes = Vec::kLanes;
  const int64_t rest = length % kLanes;
  // Registers that are three quarters full are still as fast as inner products.
  return 4 * rest >= 3 * kLanes ? length : length - rest;
}

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

  // Tasks of each weight.
  static int64_t count(const Linear& p) {
    return (p.features + kLinearFeatures - 1) / kLinearFeatures;
  }

  bool allocate() {
    const bool in_place = Math::kDepth > 1 ? p.width % 2 == 0 : p.weight.type == Type::kFloat32;
    return carve(p.out_of_memory, {{&sums, padded(kLinearFeatures) * kLinearPanel},
                                   {&copy, in_place ? 0 : kLinearFeatures * (p.width + 1)}});
  }

  void run(int64_t index) {
    const Linear own = p.part(index / count(p));
    const int64_t first = index % count(p) * kLinearFeatures, left = p.features - first;
    const int64_t features = left < kLinearFeatures ? left : kLinearFeatures;
    const Block block{{p.features, nullptr}, first, features};
    const Slice rows_of_weight = matrix(own.weight.data, own.weight.type, own.weight.row);
    const auto weight = Packing<Math>::rows(rows_of_weight, block, p.width, copy);
    with_type(p.type, [&](auto kind) {
      const LinearEpilogue<decltype(kind)> epilogue{own};
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
    const int64_t vectors = columns / Vec::kLanes;
    // More than eight rows at a multiple of 4 KB compete for the eight ways of the first cache.
    const bool compete = weight.row * int64_t(sizeof(typename Math::Element)) % 4096 == 0;
    const int64_t tile = vectors == 4   ? kRegisterTileRows<4>
                         : vectors == 3 ? kRegisterTileRows<3>
                         : compete      ? kRegisterTileRows<2> / 2
                                        : kRegisterTileRows<2>;
    const int64_t apart = rows_apart(features, tile, weight.row);
    const Right<Math> lanes{x, columns * Math::kDepth};
    const int64_t steps = Packing<Math>::steps(p.width);
    for (int64_t f = 0; f < apart && f < features; ++f) {
      // A tile's rows from end to end: cut into parts first, a call of 20 rows over 9 MB of weights
      // takes 1.4 times as long, since nobody guesses which lines come next.
      const LeftRows<Math> w{weight.data + f * weight.row, apart * weight.row};
      for (int64_t s = 0; s < steps; s += kLinearChain)
        multiply(steps_from(s, w), steps_from(s, lanes), (features - f - 1) / apart + 1, columns,
                 steps - s < kLinearChain ? steps - s : kLinearChain,
                 Add{sums + f * columns, apart * columns, s == 0});
    }
    store_transposed(epilogue, block, first, features, sums);
  }

  // How far apart the rows of W are that a tile of so many takes: each goes on with its neighbours
  // in the next tiles. Rows side by side share pages, in which nobody guesses the lines of more
  // than one: 4.7 MB in rows of 1.5 KB come at 11 GB/s, and at 20 from pages of their own.
  static int64_t rows_apart(int64_t features, int64_t tile, int64_t row) {
    const int64_t apart = (features + tile - 1) / tile;
    const bool compete = apart * row * int64_t(sizeof(typename Math::Element)) % 4096 == 0;
    return compete && apart > 1 ? apart + 1 : apart;
  }

  template <class Epilogue>
  void inner(const Epilogue& epilogue, const LeftRows<Math>& weight, int64_t first,
             int64_t features, int64_t index) {
    const Block block = LinearRows<Math>::part(rows.inner, index);
    using Element = typename Math::Element;
    const int64_t stride = padded(kLinearFeatures);
    const int64_t apart = rows_apart(features, kInnerFeatures, weight.row);
    for (int64_t f = 0; f < apart && f < features; ++f) {
      const int64_t count = (features - f - 1) / apart + 1;
      const Element* w[kInnerFeatures];  // the last one again behind the end
      for (int64_t i = 0; i < kInnerFeatures; ++i)
        w[i] = weight.data + (f + (i < count ? i : count - 1) * apart) * weight.row;
      int64_t i = 0;
      // Tiles alike, or a last row alone would read W for itself.
      for (int64_t tiles = (block.count + kInnerRows - 1) / kInnerRows; tiles > 0; --tiles) {
        const int64_t some = (block.count - i + tiles - 1) / tiles;
        const Element* x[kInnerRows];
        for (int64_t r = 0; r < some; ++r)
          x[r] = rows.inner_x.data + (index * kLinearPanel + i + r) * rows.inner_x.row;
        float tile[2 * Vec::kLanes];
        const auto multiply = some == 1   ? multiply_inner<Math, 1>
                              : some == 2 ? multiply_inner<Math, 2>
                                          : multiply_inner<Math, kInnerRows>;
        multiply(x, w, p.width, tile);
        for (int64_t r = 0; r < some; ++r)
          for (int64_t j = 0; j < count; ++j)
            sums[(i + r) * stride + f + j * apart] = tile[r * kInnerFeatures + j];
        i += some;
      }
    }
    for (int64_t i = 0; i < block.count; ++i)
      for (int64_t f = 0; f < features; f += Vec::kLanes) {
        const int64_t some = features - f < Vec::kLanes ? features - f : Vec::kLanes;
        epilogue(block[i], first + f, some, Vec::load(sums + i * stride + f));
      }
  }
};

// What the tasks of a round share.
template <class Math>
struct LinearRound {
  const Linear& p;
  const LinearRows<Math>& rows;
  Slice x;
};

template <class Math>
void linear_round(const LinearRound<Math>& round, ParallelFor parallel) {
  const auto transpose = [](int64_t begin, int64_t end, const void* context) {
    const auto& [p, rows, x] = *static_cast<const LinearRound<Math>*>(context);
    for (int64_t i = begin; i < end; ++i)
      Packing<Math>::lanes(x, rows.panel(i), p.width, 1.0f,
                           rows.transposed + i * LinearRows<Math>::panel_size(p));
  };
  const auto multiply = [](int64_t begin, int64_t end, const void* context) {
    const auto& round = *static_cast<const LinearRound<Math>*>(context);
    LinearTask<Math> task{round.p, round.rows, nullptr, nullptr};
    if (!task.allocate()) return;
    for (int64_t i = begin; i < end; ++i) task.run(i);
  };
  const auto& [p, rows, x] = round;
  const double outer = double(rows.outer.count) * double(p.width);
  const double inner = double(rows.inner.count) * double(p.width);
  // Transposing a number takes about as long as eight products.
  run(parallel, rows.panels(), 16.0 * outer, transpose, round);
  run(parallel, p.count * LinearTask<Math>::count(p),
      2.0 * (outer + inner) * double(p.count * p.features), multiply, round);
}

// x in the type of the weight, in `memory` where it has another.
inline Slice rounded_input(const Linear& p, uint16_t* memory, ParallelFor parallel) {
  if (p.weight.type == p.type) return matrix(p.x, p.type, p.x_row);
  struct Rounding {
    const Linear& p;
    uint16_t* to;
  } rounding{p, memory};
  const auto round = [](int64_t begin, int64_t end, const void* context) {
    const auto& [p, to] = *static_cast<const Rounding*>(context);
    const auto* x = static_cast<const float*>(p.x);
    for (int64_t i = begin; i < end; ++i)
      convert(x + i * p.x_row, to + i * p.width, p.weight.type, p.width);
  };
  run(parallel, p.rows, 8.0 * double(p.rows) * double(p.width), round, rounding);
  return matrix(memory, p.weight.type, p.width);
}

// Calls body(first row, rows) for each sequence.
template <class Body>
void for_sequences(const Linear& p, const Body& body) {
  if (p.packed.data) {
    for (int64_t i = 0; i < p.packed.count; ++i)
      body(p.packed.data[i], p.packed.data[i + 1] - p.packed.data[i]);
  } else {
    for (int64_t i = 0; i < p.rows; i += p.length) body(i, p.length);
  }
}

template <class Math>
void linear_rows(const Linear& p, ParallelFor parallel) {
  int64_t count = 0;
  for_sequences(p, [&](int64_t, int64_t length) { count += outer_rows(length); });
  Positions outer{count, nullptr}, inner{p.rows - count, nullptr};
  const bool mixed = count > 0 && count < p.rows;
  const auto most = [](int64_t n) { return n < kLinearRound ? n : kLinearRound; };
  const int64_t panels = (most(outer.count) + kLinearPanel - 1) / kLinearPanel;
  const int64_t transposed = panels * LinearRows<Math>::panel_size(p);
  const int64_t copied = most(inner.count) * (p.width + 1), listed = mixed ? p.rows : 0;
  const int64_t rounded = p.weight.type == p.type ? 0 : (p.rows * p.width + 1) / 2;
  float* memory = shared_scratch(size_t(transposed + copied + listed + rounded));
  if (!memory) {
    *p.out_of_memory = true;
    return;
  }
  float* lists = memory + transposed + copied;
  if (mixed) {
    auto* list = reinterpret_cast<int32_t*>(lists);
    outer.list = list, inner.list = list + count;
    int32_t *first_rows = list, *others = list + count;
    for_sequences(p, [&](int64_t begin, int64_t length) {
      const int64_t first = outer_rows(length);
      for (int64_t i = 0; i < length; ++i)
        *(i < first ? first_rows : others)++ = int32_t(begin + i);
    });
  }
  const Slice x = rounded_input(p, reinterpret_cast<uint16_t*>(lists + listed), parallel);
  for (int64_t i = 0; i < outer.count || i < inner.count; i += kLinearRound) {
    const auto some = [&](const Positions& rows) {
      return i < rows.count ? block_at(rows, i, kLinearRound) : Block{rows, 0, 0};
    };
    LinearRows<Math> rows{some(outer), some(inner), memory, {}};
    if (rows.inner.count > 0)
      rows.inner_x = Packing<Math>::rows(x, rows.inner, p.width, memory + transposed);
    linear_round(LinearRound<Math>{p, rows, x}, parallel);
  }
}

template <class HalfMath>
void linear(const Linear& p, ParallelFor parallel) {
  if (p.rows == 0 || p.features == 0) return;
  if (p.weight.type == Type::kUInt8) {
    linear_int8(p, parallel);
  } else if (kTakesAll<HalfMath> || p.weight.type == Type::kBFloat16) {
    linear_rows<HalfMath>(p, parallel);
  } else {
    HalfMath::kFloat32->linear(p, parallel);
  }
}

}  // namespace
}  // namespace ff
