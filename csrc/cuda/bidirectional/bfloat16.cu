#include "cuda/by_type.h"
#include "short_pair.cuh"

namespace ff::cuda {

const char* bidirectional_bfloat16(const BidirectionalForward& p, void* stream) {
  return run_short_pair<BFloat16>(p, stream);
}

}  // namespace ff::cuda
