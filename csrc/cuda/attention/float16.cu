#include "half.cuh"
#include "cuda/by_type.h"

namespace ff::cuda {

const char* attention_float16(const AttentionForward& p, int capability, void* workspace,
                              void* stream) {
  return attention_half<Half>(p, capability, workspace, stream);
}

const char* attention_float16(const Float8Forward& p, int capability, void* workspace,
                              void* stream) {
  return attention_half<Half>(p, capability, workspace, stream);
}

}  // namespace ff::cuda
