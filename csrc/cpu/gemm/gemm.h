// Products of matrices in register tiles, over the arithmetic of an element type.
//
// A row's result must not depend on its neighbours, on threads or on where a register tile ends:
// each element is one chain of fused multiply-adds in ascending order, whatever tile computes it.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/api.h"
#include "epilogues.h"

namespace ff {
namespace {

constexpr float kInfinity = __builtin_inff();

inline int64_t padded(int64_t n) { return (n + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes; }

// Products of float32 operands. An arithmetic says how many elements of the summed dimension a
// lane takes at once, kDepth; `BFloat16Math` takes two.
struct Float32Math {
  using Element = float;
  static constexpr int kDepth = 1;
  static constexpr const KernelTable* kFloat32 = nullptr;
  using Operand = Vec;

  static Operand broadcast(const float* p) { return Vec::set(*p); }
  static Operand load(const float* p) { return Vec::load(p); }
  static Operand load(const float* p, int64_t count) { return Vec::load(p, count); }
  static Vec add_product(Operand a, Operand b, Vec sum) { return Vec::fma(a, b, sum); }
};

// Whether kernels of an arithmetic take every type; else `kFloat32` has those for the others, so
// that they are compiled once.
template <class Math>
constexpr bool kTakesAll = Math::kDepth == 1;

// A register tile is R rows and N registers of columns of a product, which stay in registers while
// the steps of the summed dimension go by, kDepth elements each:
//
//                             b, right, step s:   [ n = 0 ] [ n = 1 ] ..
//     a, left, step s:  row 0   x, broadcast  ->  [ + + + ] [ + + + ]
//                       row 1   x             ->  [ + + + ] [ + + + ]
//
// The left operand, kDepth elements at a time: those of one step, or those of one row, follow each
// other in memory, and the compiler knows which, or it would keep a register for every row.

// Row r and step s at data + r * row + s * kDepth.
template <class Math_>
struct LeftRows {
  using Math = Math_;
  const typename Math::Element* data;
  int64_t row;

  // Four rows to a pointer, or offsets of twelve would take the registers of the loop.
  template <int R>
  struct Cursor {
    static constexpr int kPointers = (R + 3) / 4;
    const typename Math::Element* at[kPointers];
    int64_t row;

    Cursor(const LeftRows& a, int64_t first) : row(a.row) {
#pragma GCC unroll 3
      for (int i = 0; i < kPointers; ++i) at[i] = a.data + (first + 4 * i) * a.row;
    }
    const typename Math::Element* operator[](int r) const { return at[r / 4] + r % 4 * row; }
    void advance() {
#pragma GCC unroll 3
      for (int i = 0; i < kPointers; ++i) at[i] += Math::kDepth;
    }
  };
};

// Row r and step s at data + r * kDepth + s * step.
template <class Math_>
struct LeftColumns {
  using Math = Math_;
  const typename Math::Element* data;
  int64_t step;

  template <int R>
  struct Cursor {
    const typename Math::Element* at;
    int64_t step;

    Cursor(const LeftColumns& a, int64_t first) : at(a.data + first * Math::kDepth), step(a.step) {}
    const typename Math::Element* operator[](int r) const { return at + r * Math::kDepth; }
    void advance() { at += step; }
  };
};

// The right operand: the lanes of step s, kDepth elements each, stand at data + s * step.
template <class Math>
struct Right {
  const typename Math::Element* data;
  int64_t step;
};

template <class Left, int R, int N, class Epilogue>
__attribute__((noinline)) void multiply_register_tile(const Left& left,
                                                      const typename Left::Math::Element* b,
                                                      int64_t b_step, int64_t steps, int64_t row,
                                                      int64_t column, const Epilogue& epilogue) {
  using Math = typename Left::Math;
  typename Left::template Cursor<R> a(left, row);
  Vec sum[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = Vec::zero();
  for (int64_t s = 0; s < steps; ++s) {
    typename Math::Operand lanes[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) lanes[n] = Math::load(b + n * Vec::kLanes * Math::kDepth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Math::Operand x = Math::broadcast(a[r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = Math::add_product(x, lanes[n], sum[r][n]);
    }
    a.advance();
    b += b_step;
  }
  const Epilogue local = epilogue;  // or its members would be read again after every store
  local(row, column, sum);
}

// As many rows as leave registers for N columns and one broadcast; beyond 8 rows of K at a stride
// of 4 KiB their lines compete for the same 8 ways of the cache, which narrow tiles have to bear.
template <int N>
constexpr int kRegisterTileRows = Vec::kRegisters == 32 ? (N == 4   ? 6
                                                           : N == 3 ? 8
                                                                    : 12)
                                                        : (N == 3   ? 4
                                                           : N == 2 ? 6
                                                                    : 12);

template <int N, class Left, class Epilogue, int... R>
void multiply_columns(const Left& a, const Right<typename Left::Math>& b, int64_t rows,
                      int64_t steps, int64_t column, const Epilogue& epilogue,
                      std::integer_sequence<int, R...>) {
  using Math = typename Left::Math;
  using RegisterTile = void (*)(const Left&, const typename Math::Element*, int64_t, int64_t,
                                int64_t, int64_t, const Epilogue&);
  static constexpr RegisterTile kRegisterTiles[] = {
      multiply_register_tile<Left, R + 1, N, Epilogue>...};
  constexpr int64_t kMost = sizeof...(R);
  int64_t row = 0;
  for (int64_t parts = (rows + kMost - 1) / kMost; parts > 0; --parts) {
    const int64_t some = (rows - row + parts - 1) / parts;
    kRegisterTiles[some - 1](a, b.data + column * Math::kDepth, b.step, steps, row, column,
                             epilogue);
    row += some;
  }
}

// A B, `columns` a multiple of the lanes.
template <class Left, class Epilogue>
void multiply(const Left& a, const Right<typename Left::Math>& b, int64_t rows, int64_t columns,
              int64_t steps, const Epilogue& epilogue) {
  constexpr int64_t kWidest = Vec::kRegisters == 32 ? 4 : 3;
  const int64_t vectors = columns / Vec::kLanes;
  int64_t done = 0;
  for (int64_t parts = (vectors + kWidest - 1) / kWidest; parts > 0; --parts) {
    const int64_t n = (vectors - done + parts - 1) / parts;
    const auto run = [&]<int N>() {
      multiply_columns<N>(a, b, rows, steps, done * Vec::kLanes, epilogue,
                          std::make_integer_sequence<int, kRegisterTileRows<N>>{});
    };
    if (n == 1) run.template operator()<1>();
    if (n == 2) run.template operator()<2>();
    if (n == 3) run.template operator()<3>();
    if constexpr (kWidest == 4) {
      if (n == 4) run.template operator()<4>();
    }
    done += n;
  }
}

// The operands from step s on.
template <class Math>
LeftRows<Math> steps_from(int64_t s, const LeftRows<Math>& a) {
  return {a.data + s * Math::kDepth, a.row};
}
template <class Math>
LeftColumns<Math> steps_from(int64_t s, const LeftColumns<Math>& a) {
  return {a.data + s * a.step, a.step};
}
template <class Math>
Right<Math> steps_from(int64_t s, const Right<Math>& b) {
  return {b.data + s * b.step, b.step};
}

// Without the rows before row r.
template <class Math>
LeftRows<Math> rows_from(int64_t r, const LeftRows<Math>& a) {
  return {a.data + r * a.row, a.row};
}

// A B into `to`, as sums over `part` steps each that are added in order. Over 16: half the
// error of one chain of 64, for products of so few rows or columns that the plain formula takes dot
// products.
template <class Math>
void multiply_in_parts(const LeftRows<Math>& a, const Right<Math>& b, int64_t rows, int64_t columns,
                       int64_t steps, float* to, int64_t part = 16) {
  for (int64_t s = 0; s == 0 || s < steps; s += part) {
    const int64_t some = steps - s < part ? steps - s : part;
    multiply(steps_from(s, a), steps_from(s, b), rows, columns, some, Add{to, columns, s == 0});
  }
}

// Sums over the dim of a head, those of long ones in parts, which are added up in `to`. One
// chain of 256 steps errs 1.5 times the plain formula, which begins anew about every 128, and up to
// 3 times where few rows are seen; four of 64 err 0.8 times, 1.2 at most. Scores take 3 to 5 % more
// of a call's time then. The dim alone decides: a row has the same bits among few rows and many.
template <class Math, class Epilogue>
void multiply_dims(const LeftRows<Math>& a, const Right<Math>& b, int64_t rows, int64_t columns,
                   int64_t steps, float* to, const Epilogue& epilogue) {
  constexpr int64_t kLongest = 128, kPart = 64;
  if constexpr (Math::kDepth == 1) {
    if (steps > kLongest) {
      multiply_in_parts(a, b, rows, columns, steps, to, kPart);
      finish(to, rows, columns, epilogue);
      return;
    }
  }
  multiply(a, b, rows, columns, steps, epilogue);
}

}  // namespace
}  // namespace ff
