#include "avx512bf16.h"

#include "cpu/gemm/packing_bfloat16.h"
#include "cpu/softmax/packed_weights_bfloat16.h"
#include "table.h"

namespace ff {

extern const KernelTable avx512bf16_kernels;
constexpr KernelTable avx512bf16_kernels = table<BFloat16Math>("avx512bf16");

}  // namespace ff
