#include "neonbf16.h"

#include "cpu/gemm/packing_bfloat16.h"
#include "cpu/softmax/packed_weights_bfloat16.h"
#include "table.h"

namespace ff {

extern const KernelTable neonbf16_kernels;
constexpr KernelTable neonbf16_kernels = table<BFloat16Math>("neonbf16");

}  // namespace ff
