#include "simd/neonbf16.h"

#include "attention.h"
#include "attention_backward.h"
#include "bidirectional.h"
#include "bidirectional_backward.h"
#include "operands_bfloat16.h"
#include "peak.h"

namespace ff {

extern const KernelTable neonbf16_kernels;
const KernelTable neonbf16_kernels{"neonbf16",
                                   Vec::kLanes,
                                   attention_forward<BFloat16Math>,
                                   attention_path<BFloat16Math>,
                                   attention_backward<BFloat16Math>,
                                   attention_parts,
                                   attention_part<BFloat16Math>,
                                   attention_backward_part<BFloat16Math>,
                                   bidirectional_forward<BFloat16Math>,
                                   bidirectional_backward<BFloat16Math>,
                                   peak_operations<BFloat16Math>,
                                   convert};

}  // namespace ff
