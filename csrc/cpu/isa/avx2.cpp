#include "avx2.h"

#include "table.h"

namespace ff {

extern const KernelTable avx2_kernels;
constexpr KernelTable avx2_kernels = table("avx2");

}  // namespace ff
