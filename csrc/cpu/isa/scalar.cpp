#include "scalar.h"

#include "table.h"

namespace ff {

extern const KernelTable scalar_kernels;
constexpr KernelTable scalar_kernels = table("scalar");

}  // namespace ff
