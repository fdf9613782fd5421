// Attention forward by type, a translation unit each, so that they compile side by side.
#pragma once

#include "api.h"

namespace ff::cuda {

const char* attention_float16(const AttentionForward&, int capability, void* workspace,
                              void* stream);
const char* attention_bfloat16(const AttentionForward&, int capability, void* workspace,
                               void* stream);
const char* attention_float16(const Float8Forward&, int capability, void* workspace, void* stream);
const char* attention_bfloat16(const Float8Forward&, int capability, void* workspace, void* stream);
const char* bidirectional_float16(const BidirectionalForward&, void* stream);
const char* bidirectional_bfloat16(const BidirectionalForward&, void* stream);

}  // namespace ff::cuda
