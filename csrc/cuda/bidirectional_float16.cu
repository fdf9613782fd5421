#include "attention_types.h"
#include "bidirectional_short.cuh"

namespace ff::cuda {

const char* bidirectional_float16(const BidirectionalForward& p, void* stream) {
  return run_short_pair<Half>(p, stream);
}

}  // namespace ff::cuda
