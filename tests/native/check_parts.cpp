// The parts that kernels are made of: products and their epilogues, packed operands, masks, the
// softmax of a block, activations, each against double or scalar code, over the vector type of an
// instruction set. FF_BFLOAT16 says that the set multiplies bfloat16.

#include <string>

#include "checks.h"
#ifdef FF_BFLOAT16
#include "cpu/gemm/packing_bfloat16.h"
#include "cpu/softmax/packed_weights_bfloat16.h"
#endif
#include "cpu/attention/decode.h"
#include "cpu/layers/activations.h"
#include "cpu/softmax/epilogue.h"
#include "cpu/attention/tail_queries.h"

// The scratch memory of tasks, of which none runs here.
namespace ff {
float* scratch(size_t) { return nullptr; }
float* shared_scratch(size_t) { return nullptr; }
}  // namespace ff

namespace {

using ff::Activation;
using ff::Float32Math;
using Numbers = std::vector<double>;
using Floats = std::vector<float>;

Random random_numbers;

// A matrix in memory as a caller may have it: any type and strides, NaN between its elements.
struct Matrix {
  Type type;
  int64_t rows, columns, row, column;
  Floats wide;
  std::vector<uint16_t> narrow;
  Numbers exact;  // as stored

  Matrix(Type type, int64_t rows, int64_t columns, int64_t column = 1)
      : type(type), rows(rows), columns(columns), row(columns * column + 3), column(column) {
    wide.assign(size_t(rows * row + 1), kNan);
    narrow.assign(wide.size(), 0x7fff);
    exact.assign(size_t(rows * columns), 0.0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        const auto at = size_t(i * row + j * column);
        wide[at] = random_numbers.normal();
        if (type == Type::kBFloat16) {
          wide[at] = ff::bfloat16_to_float(narrow[at] = ff::float_to_bfloat16(wide[at]));
        } else if (type == Type::kFloat16) {
          wide[at] = ff::half_to_float(narrow[at] = ff::float_to_half(wide[at]));
        }
        exact[size_t(i * columns + j)] = wide[at];
      }
  }

  ff::View view() const {
    const void* data = narrow.data();
    return {type == Type::kFloat32 ? wide.data() : data, 0, 0, row, column};
  }
  ff::Slice slice() const { return ff::Slice(view(), type, 0, 0); }
  double operator()(int64_t i, int64_t j) const { return exact[size_t(i * columns + j)]; }
};

float number(float x) { return x; }
[[maybe_unused]] float number(uint16_t x) { return ff::bfloat16_to_float(x); }

// Positions 0, 1, ... or, listed, every second one.
struct Rows {
  std::vector<int32_t> list;
  ff::Block block;

  Rows(int64_t count, bool listed) {
    for (int64_t i = 0; i < count && listed; ++i) list.push_back(int32_t(2 * i + 1));
    block = {{count, listed ? list.data() : nullptr}, 0, count};
  }
};

const char* name_of(Type type) {
  return type == Type::kFloat32 ? "float32" : type == Type::kBFloat16 ? "bfloat16" : "float16";
}

// Everything that Packing<Math> makes of a matrix, element by element.
template <class Math>
void check_packing(Type type) {
  using Packing = ff::Packing<Math>;
  using Element = typename Math::Element;
  constexpr int64_t kDepth = Math::kDepth;
  for (const int64_t count : {int64_t{1}, int64_t{5}, kLanes, 2 * kLanes + 3})
    for (const int64_t dim : {1, 6, 16, 33, 64})
      for (const int variant : {0, 1, 2, 3}) {
        const Rows rows(count, variant & 1);
        const ff::Block& block = rows.block;
        const Matrix from(type, 2 * count + 1, dim, variant & 2 ? 2 : 1);
        const int64_t steps = Packing::steps(dim), lanes = ff::padded(count);
        const int64_t width = ff::padded(dim);
        Floats memory(size_t((lanes + 2) * (width + 2 * kLanes)), kNan);
        char about[80];
        std::snprintf(about, sizeof about, "%s, depth %d, %d x %d, variant %d", name_of(type),
                      int(kDepth), int(count), int(dim), variant);
        const auto at = [&](int64_t i, int64_t d) {
          return i < count && d < dim ? float(from(block[i], d)) : 0.0f;
        };

        const auto left = Packing::rows(from.slice(), block, dim, memory.data());
        for (int64_t i = 0; i < count; ++i)
          for (int64_t d = 0; d < steps * kDepth; ++d)
            expect(number(left.data[i * left.row + d]) == at(i, d), "rows of %s", about);

        memory.assign(memory.size(), kNan);
        const auto right = Packing::columns(from.slice(), block, dim, memory.data());
        for (int64_t s = 0; s < Packing::steps(count); ++s)
          for (int64_t e = 0; e < width * kDepth; ++e) {
            const Element x = right.data[s * right.step + e];
            expect(number(x) == at(s * kDepth + e % kDepth, e / kDepth), "columns of %s", about);
          }

        for (const float factor : {1.0f, -0.7f}) {
          // bfloat16 takes the sign alone.
          const float taken = kDepth > 1 ? std::copysign(1.0f, factor) : factor;
          memory.assign(memory.size(), kNan);
          const auto turned = Packing::lanes(from.slice(), block, dim, factor, memory.data());
          for (int64_t s = 0; s < steps; ++s)
            for (int64_t e = 0; e < lanes * kDepth; ++e) {
              const float x = number(turned.data[s * turned.step + e]);
              expect(x == taken * at(e / kDepth, s * kDepth + e % kDepth), "lanes of %s", about);
            }
          auto* row = reinterpret_cast<Element*>(memory.data());
          Packing::row(from.slice(), block[count - 1], dim, width * kDepth, factor, row);
          for (int64_t d = 0; d < width * kDepth; ++d)
            expect(number(row[d]) == taken * at(count - 1, d), "row of %s", about);
        }
      }
}

// A B against double, and each element the same bits whatever tile it is in. `left(r, s)` is
// element s of row r of A.
template <class Left, class Number>
void check_product(const char* name, const Left& a, int64_t rows, int64_t depth,
                   const Number& left) {
  using Math = typename Left::Math;
  using Packing = ff::Packing<Math>;
  const Type type = Math::kDepth > 1 ? Type::kBFloat16 : Type::kFloat32;
  constexpr int64_t kMost = 5 * kLanes;
  const Matrix b(type, depth, kMost);
  Floats memory(size_t((depth + 1) * kMost)), to(size_t(rows * kMost)), one(size_t(rows * kLanes));
  const auto right = Packing::columns(b.slice(), Rows(depth, false).block, kMost, memory.data());
  const int64_t steps = Packing::steps(depth);
  for (int64_t columns = kLanes; columns <= kMost; columns += kLanes)
    for (int64_t some = 1; some <= rows; some += columns == kMost ? 1 : rows - 1) {
      to.assign(to.size(), kNan);
      ff::multiply(a, right, some, columns, steps, ff::Store{to.data(), columns});
      for (int64_t i = 0; i < some; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          double exact = 0.0, size = 0.0;
          for (int64_t s = 0; s < depth; ++s)
            exact += left(i, s) * b(s, j), size += std::fabs(left(i, s) * b(s, j));
          const double error = std::fabs(to[size_t(i * columns + j)] - exact);
          expect(error <= 6e-8 * double(depth + 1) * size, "%s, %d x %d, element %d, %d: %g", name,
                 int(some), int(columns), int(i), int(j), error);
        }
      // The last column's register, alone.
      ff::multiply(a, {right.data + (columns - kLanes) * Math::kDepth, right.step}, some, kLanes,
                   steps, ff::Store{one.data(), kLanes});
      for (int64_t i = 0; i < some; ++i)
        for (int64_t j = 0; j < kLanes; ++j)
          expect(one[size_t(i * kLanes + j)] == to[size_t(i * columns + columns - kLanes + j)],
                 "%s: the bits of row %d depend on the tile", name, int(i));
    }
}

template <class Math>
void check_parts() {
  using Packing = ff::Packing<Math>;
  const Type type = Math::kDepth > 1 ? Type::kBFloat16 : Type::kFloat32;
  constexpr int64_t kRows = 27;
  for (const int64_t depth : {1, 15, 64}) {
    const Matrix rows(type, kRows, depth), columns(type, depth, kRows);
    Floats memory(size_t(kRows * (depth + 1))), turned(size_t((depth + 1) * (kRows + 2 * kLanes)));
    const auto left = Packing::rows(rows.slice(), Rows(kRows, false).block, depth, memory.data());
    check_product("rows", left, kRows, depth, rows);
    const auto right =
        Packing::columns(columns.slice(), Rows(depth, false).block, kRows, turned.data());
    check_product("columns", ff::LeftColumns<Math>{right.data, right.step}, kRows, depth,
                  [&](int64_t r, int64_t s) { return columns(s, r); });
  }
}

void check_product_in_parts() {
  constexpr int64_t kRows = 3, kDepth = 100;
  const Matrix a(Type::kFloat32, kRows, kDepth), b(Type::kFloat32, kDepth, kLanes);
  Floats to(size_t(kRows * kLanes), kNan);
  ff::multiply_in_parts(ff::LeftRows<Float32Math>{a.wide.data(), a.row}, {b.wide.data(), b.row},
                        kRows, kLanes, kDepth, to.data());
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kLanes; ++j) {
      double exact = 0.0, size = 0.0;
      for (int64_t s = 0; s < kDepth; ++s)
        exact += a(i, s) * b(s, j), size += std::fabs(a(i, s) * b(s, j));
      expect(std::fabs(to[size_t(i * kLanes + j)] - exact) <= 6e-8 * 16 * size, "product in parts");
    }
}

// What becomes of a register tile of 3 rows by 2 registers that begins at row 2, column kLanes.
void check_epilogues() {
  constexpr int64_t kFirst = 2, kStride = 4 * kLanes + 1, kWidth = 4 * kLanes;
  Vec sum[3][2];
  float x[3][2 * kLanes];
  for (int r = 0; r < 3; ++r)
    for (int n = 0; n < 2; ++n) {
      Lanes lanes;
      for (int64_t i = 0; i < kLanes; ++i)
        lanes[i] = x[r][n * kLanes + i] = r == 1 && i == 2 ? kNan : random_numbers.normal();
      sum[r][n] = lanes;
    }
  const Floats before = random_numbers.normals(6 * kStride),
               factor = random_numbers.normals(kWidth);
  const Floats maximum = random_numbers.normals(kWidth);
  uint16_t shown[6 * 4];
  for (uint16_t& lanes : shown) lanes = uint16_t(random_numbers.bits() & ((1u << kLanes) - 1));
  const auto is_shown = [&](int r, int64_t c) {
    return (shown[(kFirst + r) * 4 + 1 + c / kLanes] >> c % kLanes & 1) != 0;
  };

  // `right(x, old, row, column)` says whether x may stand where `old` stood.
  Floats to, largest;
  const auto run = [&](const char* name, const auto& epilogue, int64_t stride, const auto& right) {
    epilogue(kFirst, kLanes, sum);
    for (int64_t at = 0; at < 6 * stride; ++at) {
      const int64_t row = at / stride - kFirst, column = at % stride - kLanes;
      const bool inside = row >= 0 && row < 3 && column >= 0 && column < 2 * kLanes;
      const float old = before[size_t(at)], now = to[size_t(at)];
      const bool holds = inside ? right(now, old, int(row), column) : same(now, old);
      expect(holds, "%s, row %d, column %d: %g", name, int(row), int(column), now);
    }
    to = before;
  };
  to = before;
  run("Store", ff::Store{to.data(), kStride}, kStride,
      [&](float now, float, int r, int64_t c) { return same(now, x[r][c]); });
  for (const bool first : {true, false}) {
    run("Add", ff::Add{to.data(), kStride, first}, kStride,
        [&](float now, float old, int r, int64_t c) {
          return same(now, first ? x[r][c] : old + x[r][c]);
        });
    run("Rescale", ff::Rescale{to.data(), kStride, factor.data(), first}, kStride,
        [&](float now, float old, int r, int64_t c) {
          return first ? same(now, x[r][c]) : is_fma(now, old, factor[size_t(kFirst + r)], x[r][c]);
        });
    run("RescaleColumns", ff::RescaleColumns{to.data(), kStride, factor.data(), first}, kStride,
        [&](float now, float old, int r, int64_t c) {
          return first ? same(now, x[r][c]) : is_fma(now, old, factor[size_t(kLanes + c)], x[r][c]);
        });
  }
  const auto check_maxima = [&](const char* name, const auto& value) {
    for (int64_t c = 0; c < kWidth; ++c) {
      float expected = maximum[size_t(c)];
      for (int r = 0; r < 3 && c >= kLanes && c < 3 * kLanes; ++r) {
        const float now = value(r, c - kLanes);
        expected = now > expected ? now : expected;
      }
      expect(largest[size_t(c)] == expected, "%s, column %d", name, int(c));
    }
  };
  largest = maximum;
  run("StoreMaximum", ff::StoreMaximum{to.data(), kStride, largest.data()}, kStride,
      [&](float now, float, int r, int64_t c) { return same(now, x[r][c]); });
  check_maxima("StoreMaximum", [&](int r, int64_t c) { return x[r][c]; });
  const auto left = [&](int r, int64_t c) { return is_shown(r, c) ? x[r][c] : -kEndless; };
  largest = maximum;
  run("StoreShown", ff::StoreShown{to.data(), kWidth, largest.data(), shown}, kWidth,
      [&](float now, float, int r, int64_t c) { return same(now, left(r, c)); });
  check_maxima("StoreShown", left);

  for (const bool first : {true, false}) {
    const Floats rescale = random_numbers.normals(6);
    const Floats sums = random_numbers.normals(6 * kWidth);
    run("StoreMeans",
        ff::StoreMeans<ff::Float32>{to.data(), kStride, factor.data(),
                                    first ? nullptr : sums.data(), kWidth, rescale.data()},
        kStride, [&](float now, float, int r, int64_t c) {
          const float part = x[r][c] * factor[size_t(kFirst + r)];
          const float other = sums[size_t((kFirst + r) * kWidth + kLanes + c)];
          return first ? same(now, part) : is_fma(now, other, rescale[size_t(kFirst + r)], part);
        });
  }
}

// Numbers of any type and stride, to and from float32, with factors of their rows.
void check_conversions() {
  for (const Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    for (const int64_t column : {1, 3})
      for (const int64_t dim : {1, 7, 16, 37}) {
        Matrix m(type, 3, dim, column);
        const int64_t width = ff::padded(dim);
        Floats rows(size_t(3 * width), kNan);
        ff::convert_rows(m.slice(), Rows(3, false).block, dim, width, rows.data());
        for (int64_t e = 0; e < 3 * width; ++e) {
          const int64_t i = e / width, d = e % width;
          expect(rows[size_t(e)] == (d < dim ? m(i, d) : 0.0), "convert_rows, %s", name_of(type));
        }
        Matrix to(type, 3, dim, column);
        const ff::View view = to.view();
        const ff::MutableView out{const_cast<void*>(view.data), 0, 0, view.row, view.column};
        ff::store_rows(
            out, type, 0, 0, Rows(3, false).block, dim,
            [](int64_t i) { return i == 1 ? 2.0f : 1.0f; }, rows.data());
        for (int64_t i = 0; i < 3; ++i)
          for (int64_t at = 0; at < to.row; ++at) {
            const auto place = size_t(i * to.row + at);
            const bool inside = at % column == 0 && at / column < dim;
            const float twice = inside ? float(m(i, at / column)) * (i == 1 ? 2.0f : 1.0f) : 0.0f;
            const bool right =
                type == Type::kFloat32 ? same(to.wide[place], inside ? twice : kNan)
                : type == Type::kBFloat16
                    ? to.narrow[place] == (inside ? ff::float_to_bfloat16(twice) : 0x7fff)
                    : to.narrow[place] == (inside ? ff::float_to_half(twice) : 0x7fff);
            expect(right, "store_rows, %s, column stride %d", name_of(type), int(column));
          }
      }
}

// A call of few numbers, for what asks one.
struct Call : ff::Attention {
  bool failed = false;

  Call(int64_t queries, int64_t keys) : ff::Attention{} {
    batch = heads = kv_heads = 1, q_len = queries, kv_len = keys, head_dim = value_dim = 1;
    type = Type::kFloat32, scale = 1.0f, out_of_memory = &failed;
  }
};

// Masks of every kind and stride, the diagonal and a window, on the scores of a block.
void check_masks() {
  constexpr int64_t kQueries = 2 * kLanes + 3, kKeys = 45;
  const int64_t columns = ff::padded(kQueries);
  const uint8_t bytes[] = {0, 1, 2, 0, 128, 255, 0};
  for (const bool listed : {false, true})
    for (const bool logical : {false, true})
      for (const int layout : {0, 1, 2, 3, 4}) {
        const Rows keys(kKeys, listed);
        const int64_t length = listed ? 2 * kKeys + 1 : kKeys;
        Call call(kQueries, length);
        const Floats bias = random_numbers.normals(kQueries * length + 40);
        std::vector<Bool> truth(bias.size());
        for (Bool& t : truth) t = {bytes[random_numbers.bits() % 7]};
        const int64_t strides[5][2] = {{length, 1}, {1, kQueries}, {0, 1}, {1, 0}, {0, 0}};
        const void* data = truth.data();
        call.mask = {logical ? data : bias.data(), 0, 0, strides[layout][0], strides[layout][1]};
        call.mask_type = logical ? Type::kBool : Type::kFloat32;
        call.right = layout == 1 ? 0 : layout == 3 ? 5 : ff::kEndless;
        call.left = layout == 3 ? 9 : ff::kEndless;
        const ff::Block queries = Rows(kQueries, false).block;
        Floats scores = random_numbers.normals(kKeys * columns), maximum(size_t(columns), kNan);
        const Floats given = scores;
        const ff::Scores at{call, 0, 0, queries, columns, scores.data()};
        ff::mask_scores(at, keys.block, 0.5f, maximum.data());
        const auto expected = [&](int64_t i, int64_t k) {
          const auto place = size_t(i * call.mask.row + keys.block[k] * call.mask.column);
          const float score = given[size_t(k * columns + i)] * 0.5f;
          const int64_t behind = keys.block[k] - i;
          if (behind > call.right || -behind > call.left) return -kEndless;
          return logical ? (truth[place] ? score : -kEndless) : score + bias[place];
        };
        for (int64_t i = 0; i < kQueries; ++i) {
          float largest = -kEndless;
          for (int64_t k = 0; k < kKeys; ++k) {
            const float exact = expected(i, k);
            largest = exact > largest ? exact : largest;
            expect(same(scores[size_t(k * columns + i)], exact), "mask_scores, layout %d", layout);
          }
          expect(maximum[size_t(i)] == largest, "maxima of mask_scores, layout %d", layout);
        }
        if (!ff::maskable_product(at, keys.block)) continue;
        std::vector<uint16_t> shown(size_t(kKeys * columns / kLanes), uint16_t{0xffff});
        ff::shown_lanes(at, keys.block, shown.data());
        for (int64_t k = 0; k < kKeys; ++k)
          for (int64_t i = 0; i < kQueries; ++i) {
            const int lanes = shown[size_t(k * columns / kLanes + i / kLanes)];
            const bool here = (lanes >> i % kLanes & 1) != 0;
            expect(here == (expected(i, k) != -kEndless), "shown_lanes, layout %d", layout);
          }
      }
  std::vector<Bool> padding(2 * 40);
  for (Bool& hidden : padding) hidden = {bytes[random_numbers.bits() % 7]};
  Call call(1, 40);
  call.padding = padding.data(), call.padding_column = 2;
  int32_t list[40], both[40];
  const ff::Positions visible = ff::visible_keys(call, 0, 0, 37, list);
  const ff::VisibleAndHidden both_kinds = ff::by_visibility(padding.data(), 0, 2, 40, both);
  int64_t found = 0, seen = 0, hidden = 0;
  for (int64_t j = 0; j < 40; ++j) {
    const bool is_hidden = padding[size_t(2 * j)].byte != 0;
    if (j < 37 && !is_hidden) expect(visible[found++] == j, "visible_keys");
    expect(is_hidden ? both_kinds.hidden[hidden++] == j : both_kinds.visible[seen++] == j,
           "by_visibility");
  }
  expect(visible.count == found, "visible_keys: %d, not %d", int(visible.count), int(found));
  expect(both_kinds.visible.count == seen && both_kinds.hidden.count == hidden, "by_visibility");
}

// Weighted values over two blocks of scores, against double. `attend` makes weights and statistics
// of a block, as the left operand of its product with the values.
template <class Math, class Attend>
void check_softmax(const std::string& name, int64_t queries, int64_t columns, double most,
                   const Attend& attend) {
  using Packing = ff::Packing<Math>;
  constexpr int64_t kBlocks[] = {37, 21}, kKeys = 58, kDim = 40;
  const Type type = Math::kDepth > 1 ? Type::kBFloat16 : Type::kFloat32;
  const Matrix query(type, queries, kDim), key(type, kKeys, kDim), value(type, kKeys, kLanes);
  const float scale = -0.8f;
  Floats query_memory(size_t((queries + 2 * kLanes) * (kDim + 2 * kLanes)));
  Floats memory(size_t(2 * kKeys * (kDim + kLanes))), value_memory(size_t(2 * kKeys * kLanes));
  Floats scores(size_t((kKeys + 2) * (columns + kLanes)), kNan), maximum(size_t(columns + kLanes));
  Floats statistics(size_t(3 * (columns + kLanes))), outs(size_t((columns + 1) * kLanes));
  float* place = statistics.data();
  const ff::Statistics s{place, place + columns + kLanes, place + 2 * (columns + kLanes)};
  s.clear(columns + kLanes);
  const ff::Scaling scaling = ff::scaling_of<Math>(scale, ff::Base::kTwo);
  const auto lanes = attend.queries(query.slice(), kDim, scaling.factor, query_memory.data());
  const double most_lse = Math::kDepth > 1 ? 1e-4 : 1e-5;  // its weights err by so much
  int64_t done = 0;
  for (const int64_t count : kBlocks) {
    const ff::Block block{{kKeys, nullptr}, done, count};
    const auto rows = Packing::rows(key.slice(), block, kDim, memory.data());
    attend(rows, lanes, block, Packing::steps(kDim), scaling.unit, maximum.data(), scores.data(),
           s);
    const auto values = Packing::columns(value.slice(), block, kLanes, value_memory.data());
    ff::multiply(ff::PackedWeights<Math>::by_query(scores.data(), columns), values, queries, kLanes,
                 Packing::steps(count), ff::Rescale{outs.data(), kLanes, s.rescale, done == 0});
    done += count;
  }
  for (int64_t i = 0; i < queries; ++i) {
    Numbers exact(size_t(kLanes), 0.0);
    double sum = 0.0, error = 0.0, size = 0.0;
    for (int64_t j = 0; j < kKeys; ++j) {
      double score = 0.0;
      for (int64_t d = 0; d < kDim; ++d) score += query(i, d) * key(j, d);
      const double weight = std::exp(double(scale) * score);
      sum += weight;
      for (int64_t c = 0; c < kLanes; ++c) exact[size_t(c)] += weight * value(j, c);
    }
    for (int64_t c = 0; c < kLanes; ++c) {
      const double mean = exact[size_t(c)] / sum;
      error += std::pow(outs[size_t(i * kLanes + c)] * ff::inverse(s.sum[i]) - mean, 2.0);
      size += mean * mean;
    }
    const double relative = std::sqrt(error / size);
    expect(relative <= most, "%s of %d queries: %g", name.c_str(), int(queries), relative);
    const double lse = ff::log_sum(s.maximum[i], s.sum[i], ff::Base::kTwo);
    expect(std::fabs(lse - std::log(sum)) <= most_lse, "%s: lse", name.c_str());
  }
}

// With lanes of queries.
template <class Math>
struct ByQueryTile {
  int64_t count, columns;

  ff::Right<Math> queries(const ff::Slice& from, int64_t dim, float factor, float* to) const {
    return ff::Packing<Math>::lanes(from, Rows(count, false).block, dim, factor, to);
  }

  void operator()(const ff::LeftRows<Math>& keys, const ff::Right<Math>& lanes,
                  const ff::Block& block, int64_t steps, float unit, float* maximum, float* scores,
                  const ff::Statistics& s) const {
    for (int64_t i = 0; i < columns; ++i) maximum[i] = -kEndless;
    ff::multiply(keys, lanes, block.count, columns, steps,
                 ff::StoreMaximum{scores, columns, maximum});
    ff::online_softmax<Math>(ff::Base::kTwo, block, columns, unit, maximum, nullptr, scores, s);
  }
};

// With lanes along the head dim, for the queries beyond whole registers.
template <class Math>
struct ByTail {
  int64_t count, columns;

  ff::Right<Math> queries(const ff::Slice& from, int64_t dim, float factor, float* to) const {
    return ff::tail_rows<Math>(from, Rows(count, false).block, dim, factor, to);
  }

  void operator()(const ff::LeftRows<Math>& keys, const ff::Right<Math>& rows,
                  const ff::Block& block, int64_t steps, float unit, float* maximum, float* scores,
                  const ff::Statistics& s) const {
    const ff::Attention plain{};
    const ff::Scores of_tail{plain, 0, 0, Rows(count, false).block, columns, scores};
    ff::attend_tail<Math>(keys, rows, block.count, steps, columns, ff::Base::kTwo,
                          ff::TailBias{of_tail, block, unit}, maximum, scores, s);
  }
};

template <class Math>
void check_softmaxes() {
  const std::string kind = Math::kDepth > 1 ? "bfloat16 " : "float32 ";
  const double most = Math::kDepth > 1 ? 1e-2 : 3e-6;
  for (const int64_t queries : {int64_t{1}, kLanes + 3, 3 * kLanes}) {
    const int64_t columns = ff::padded(queries);
    check_softmax<Math>(kind + "softmax", queries, columns, most,
                        ByQueryTile<Math>{queries, columns});
  }
  for (int64_t queries = 1; queries <= ff::kMostTail<Math>; ++queries) {
    const int64_t columns = ff::tail_columns(queries);
    check_softmax<Math>(kind + "tail", queries, columns, most, ByTail<Math>{queries, columns});
  }
}

// Dot products and sums over rows with lanes along the dim, of the decode path.
template <class T>
void check_decode(Type type) {
  for (const int64_t dim : {1, 7, 16, 77, 160}) {
    constexpr int64_t kCount = 21;
    const Matrix m(type, kCount, dim);
    const void* data = m.view().data;
    const ff::Rows<T> rows{static_cast<const typename T::Element*>(data), m.row, nullptr};
    const int64_t width = ff::padded(dim);
    Floats query = random_numbers.normals(width), weight = random_numbers.normals(kCount);
    for (int64_t d = dim; d < width; ++d) query[size_t(d)] = 0.0f;
    for (int64_t first = 0; first < kCount; first += kLanes) {
      const int64_t count = kCount - first < kLanes ? kCount - first : kLanes;
      const Lanes dots = ff::dot_products<T>(query.data(), rows, first, count, dim);
      for (int64_t i = 0; i < count; ++i) {
        double exact = 0.0, size = 0.0;
        for (int64_t d = 0; d < dim; ++d) {
          exact += query[size_t(d)] * m(first + i, d);
          size += std::fabs(query[size_t(d)] * m(first + i, d));
        }
        expect(std::fabs(dots[i] - exact) <= 2e-6 * size, "dot_products, %s", name_of(type));
      }
    }
    const Floats before = random_numbers.normals(width);
    Floats out = before;
    ff::add_rows<T>(weight.data(), rows, kCount, dim, 0.3f, out.data());
    for (int64_t d = 0; d < dim; ++d) {
      double exact = 0.3f * before[size_t(d)], size = std::fabs(exact);
      for (int64_t j = 0; j < kCount; ++j) {
        exact += weight[size_t(j)] * m(j, d);
        size += std::fabs(weight[size_t(j)] * m(j, d));
      }
      expect(std::fabs(out[size_t(d)] - exact) <= 2e-6 * size, "add_rows, %s", name_of(type));
    }
  }
}

// An activation against double, relative to the result wherever x is.
template <class Function>
void check_activation(const char* name, Activation activation, double most, double most_below,
                      const Function& exact) {
  const auto value = [&](float x) { return Lanes(ff::activate(activation, Vec::set(x)))[0]; };
  for (double x = -5.0; x < 10.0; x += 0.00137) {
    const double right = exact(double(float(x))), error = std::fabs(value(float(x)) / right - 1.0);
    expect(error <= (x < 0.0 ? most_below : most), "%s(%g): relative error %.2g", name, x, error);
  }
  for (const float x : {0.0f, -0.0f, 1e-45f, -1e-45f, 1e-40f, -1e-40f, 1e-30f, -1e-30f})
    expect(std::fabs(value(x) - 0.5 * x) <= 1e-45, "%s(%g): %g", name, x, value(x));
  for (const float x : {20.0f, 120.0f, 3e30f, kEndless})
    expect(value(x) == x, "%s(%g): %g", name, x, value(x));
  for (const float x : {-20.0f, -120.0f, -3e30f, -kEndless})
    expect(std::fabs(value(x) - (x < -99.0f ? 0.0 : exact(x))) <= 1e-13, "%s(%g): %g", name, x,
           value(x));
  expect(std::isnan(value(kNan)), "%s(NaN) is a number", name);
}

void check_activations() {
  const auto gelu = [](double x) { return 0.5 * x * std::erfc(-std::sqrt(0.5) * x); };
  const auto silu = [](double x) { return x / (1.0 + std::exp(-x)); };
  const auto quick_gelu = [](double x) { return x / (1.0 + std::exp(-1.702 * x)); };
  const auto gelu_tanh = [](double x) {
    const double u = std::sqrt(8.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    return x / (1.0 + std::exp(-u));
  };
  check_activation("gelu", Activation::kGelu, 1.5e-7, 8e-6, gelu);
  check_activation("gelu_tanh", Activation::kGeluTanh, 1.4e-7, 2e-6, gelu_tanh);
  check_activation("silu", Activation::kSilu, 1.4e-7, 3e-7, silu);
  check_activation("quick_gelu", Activation::kQuickGelu, 1.4e-7, 3e-7, quick_gelu);
}

}  // namespace

int main() {
  for (const Type type : {Type::kFloat32, Type::kBFloat16, Type::kFloat16})
    check_packing<Float32Math>(type);
  check_parts<Float32Math>();
  check_softmaxes<Float32Math>();
#ifdef FF_BFLOAT16
  check_packing<ff::BFloat16Math>(Type::kBFloat16);
  check_parts<ff::BFloat16Math>();
  check_softmaxes<ff::BFloat16Math>();
#endif
  check_product_in_parts();
  check_epilogues();
  check_conversions();
  check_masks();
  check_decode<ff::Float32>(Type::kFloat32);
  check_decode<ff::BFloat16>(Type::kBFloat16);
  check_decode<ff::Half>(Type::kFloat16);
  check_activations();
  return finish("parts");
}
