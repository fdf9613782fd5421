#include "avx512.h"

#include "table.h"

namespace ff {

extern const KernelTable avx512_kernels;
constexpr KernelTable avx512_kernels = table("avx512");

}  // namespace ff
