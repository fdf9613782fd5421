#include "cuda/by_type.h"
#include "short_pair.cuh"

namespace ff::cuda {

const char* bidirectional_float16(const BidirectionalForward& p, void* stream) {
  return run_short_pair<Half>(p, stream);
}

}  // namespace ff::cuda
