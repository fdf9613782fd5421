// The kernels that encoder.cpp calls, and no others, in one instruction set: for a program that is
// to be small. The tables of csrc/cpu/isa have gradients too and take 6 MB, these 2. Compiled once
// for each set, with its flags (`make example`); the other entries are null.
#if defined(__AVX512F__)
#include "cpu/isa/avx512.h"
#elif defined(__AVX2__)
#include "cpu/isa/avx2.h"
#elif defined(__ARM_NEON) && !defined(FF_SCALAR)
#include "cpu/isa/neon.h"
#else
#include "cpu/isa/scalar.h"
#endif

#include "cpu/bidirectional/forward.h"
#include "cpu/layers/encoder_layer.h"

namespace ff {
namespace {

constexpr KernelTable inference(const char* isa) {
  KernelTable table{};
  table.isa = isa;
  table.lanes = Vec::kLanes;
  table.bidirectional_forward = bidirectional_forward<Float32Math>;
  table.linear = linear<Float32Math>;
  table.norm = norm;
  table.encoder_layer = encoder_layer<Float32Math>;
  return table;
}

}  // namespace

// Sets with products of bfloat16 have the same kernels here: a model in float32 has no use for
// those.
#if defined(__AVX512F__)
extern const KernelTable avx512_kernels, avx512bf16_kernels;
constexpr KernelTable avx512_kernels = inference("avx512");
constexpr KernelTable avx512bf16_kernels = inference("avx512bf16");
#elif defined(__AVX2__)
extern const KernelTable avx2_kernels;
constexpr KernelTable avx2_kernels = inference("avx2");
#elif defined(__ARM_NEON) && !defined(FF_SCALAR)
extern const KernelTable neon_kernels, neonbf16_kernels;
constexpr KernelTable neon_kernels = inference("neon");
constexpr KernelTable neonbf16_kernels = inference("neonbf16");
#else
extern const KernelTable scalar_kernels;
constexpr KernelTable scalar_kernels = inference("scalar");
#endif

}  // namespace ff
