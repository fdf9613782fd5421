#include "neon.h"

#include "table.h"

namespace ff {

extern const KernelTable neon_kernels;
constexpr KernelTable neon_kernels = table("neon");

}  // namespace ff
