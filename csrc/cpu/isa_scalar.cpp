#include "simd/generic.h"

#include "attention.h"
#include "attention_backward.h"

namespace ff {

extern const KernelTable scalar_kernels;
const KernelTable scalar_kernels{"scalar", Vec::kLanes, attention_forward, attention_backward,
                                 convert};

}  // namespace ff
