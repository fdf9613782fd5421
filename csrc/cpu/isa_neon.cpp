#include "simd/neon.h"

#include "attention.h"
#include "attention_backward.h"
#include "bidirectional.h"
#include "bidirectional_backward.h"
#include "peak.h"

namespace ff {

extern const KernelTable neon_kernels;
const KernelTable neon_kernels{"neon",
                               Vec::kLanes,
                               attention_forward<Float32Math>,
                               attention_path<Float32Math>,
                               attention_backward<Float32Math>,
                               attention_parts,
                               attention_part<Float32Math>,
                               attention_backward_part<Float32Math>,
                               bidirectional_forward<Float32Math>,
                               bidirectional_backward<Float32Math>,
                               peak_operations<Float32Math>,
                               convert};

}  // namespace ff
