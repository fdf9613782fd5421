// What a warp computes together. Lane l is at row l / 4 and columns 2 (l % 4) and 2 (l % 4) + 1 of
// an 8x8 matrix; larger ones are put together from these (PTX ISA, "Matrix Fragments").

#include <bit>
#include <cstring>

#include "emulator.h"

namespace ff::cuda::emulation {
namespace {

constexpr int kLanes = 32;

using Words = uint32_t __attribute__((vector_size(16)));
using Integers = int32_t __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

Floats widen_bfloat16(Words bits) { return std::bit_cast<Floats>(bits << 16); }

// Without arithmetic on denormals, which the caller's thread may flush.
Floats widen_half(Words bits) {
  const Words sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
  const Words normal = (size << 13) + 0x38000000u, special = normal + 0x38000000u;
  const Floats tiny = __builtin_convertvector(Integers(size), Floats) * 0x1p-24f;
  const Words finite = size < 0x400u ? std::bit_cast<Words>(tiny) : normal;
  return std::bit_cast<Floats>(sign | (size >= 0x7c00u ? special : finite));
}

Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// 16-bit pairs as two rows of floats.
template <Floats (*kWiden)(Words)>
void widen(const uint32_t (&pairs)[8], float (&low)[8], float (&high)[8]) {
  for (int i = 0; i < 8; i += 4) {
    Words both;
    std::memcpy(&both, pairs + i, sizeof both);
    store(low + i, kWiden(both & 0xffffu));
    store(high + i, kWiden(both >> 16));
  }
}

template <Floats (*kWiden)(Words)>
void compute_product(void* const* operands) {
  uint32_t a[16][8], b[8][8];  // [row][pair of k], [pair of k][column]
  float c[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& operand = *static_cast<const ProductOperand*>(operands[lane]);
    const int row = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][pair + i / 2 * 4] = operand.a[i];
    for (int i = 0; i < 2; ++i) b[pair + i * 4][row] = operand.b[i];
    std::memcpy(&c[row][2 * pair], operand.c, 8);
    std::memcpy(&c[row + 8][2 * pair], operand.c + 2, 8);
  }
  float low[8], high[8], wide[16][8];
  for (int pair = 0; pair < 8; ++pair) widen<kWiden>(b[pair], wide[2 * pair], wide[2 * pair + 1]);
  for (int row = 0; row < 16; ++row) {
    widen<kWiden>(a[row], low, high);
    Floats sum0 = load(c[row]), sum1 = load(c[row] + 4);
    for (int pair = 0; pair < 8; ++pair) {
      const float *even = wide[2 * pair], *odd = wide[2 * pair + 1];
      sum0 += low[pair] * load(even);
      sum1 += low[pair] * load(even + 4);
      sum0 += high[pair] * load(odd);
      sum1 += high[pair] * load(odd + 4);
    }
    store(c[row], sum0);
    store(c[row] + 4, sum1);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* to = static_cast<const ProductOperand*>(operands[lane])->c;
    std::memcpy(to, &c[lane / 4][2 * (lane % 4)], 8);
    std::memcpy(to + 2, &c[lane / 4 + 8][2 * (lane % 4)], 8);
  }
}

}  // namespace

void compute_nothing(void* const*) {}

void compute_shuffle(void* const* operands) {
  uint32_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    values[lane] = static_cast<const ShuffleOperand*>(operands[lane])->value;
  for (int lane = 0; lane < kLanes; ++lane) {
    auto* operand = static_cast<ShuffleOperand*>(operands[lane]);
    operand->value = values[operand->from];
  }
}

// Matrix m from the rows of lanes 8 m to 8 m + 7, to register m of all.
void compute_matrices(void* const* operands) {
  uint32_t pairs[kLanes][4];
  for (int row = 0; row < kLanes; ++row)
    std::memcpy(pairs[row], static_cast<MatrixOperand*>(operands[row])->row, 16);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t* to = static_cast<MatrixOperand*>(operands[lane])->result;
    for (int m = 0; m < 4; ++m) to[m] = pairs[8 * m + lane / 4][lane % 4];
  }
}

void compute_matrices_transposed(void* const* operands) {
  uint16_t values[kLanes][8];
  for (int row = 0; row < kLanes; ++row)
    std::memcpy(values[row], static_cast<MatrixOperand*>(operands[row])->row, 16);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t* to = static_cast<MatrixOperand*>(operands[lane])->result;
    const int column = lane / 4, row = 2 * (lane % 4);
    for (int m = 0; m < 4; ++m)
      to[m] = values[8 * m + row][column] | uint32_t(values[8 * m + row + 1][column]) << 16;
  }
}

void compute_product_half(void* const* operands) { compute_product<widen_half>(operands); }
void compute_product_bfloat16(void* const* operands) { compute_product<widen_bfloat16>(operands); }

}  // namespace ff::cuda::emulation
