#include "attention_types.h"
#include "bidirectional_short.cuh"

namespace ff::cuda {

const char* bidirectional_bfloat16(const BidirectionalForward& p, int capability, void* stream) {
  const auto pair = short_pair(p, capability);
  return pair ? run_short_pair<BFloat16>(*pair, pair_dim(p), stream) : "too long for one launch";
}

}  // namespace ff::cuda
