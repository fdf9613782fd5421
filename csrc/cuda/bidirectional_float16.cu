#include "attention_types.h"
#include "bidirectional_short.cuh"

namespace ff::cuda {

const char* bidirectional_float16(const BidirectionalForward& p, int capability, void* stream) {
  const auto pair = short_pair(p, capability);
  return pair ? run_short_pair<Half>(*pair, pair_dim(p), stream) : "too long for one launch";
}

}  // namespace ff::cuda
