// Attention whose keys and values are 8-bit floats (E4M3), each times a scale of its head.
#pragma once

#include "calls.h"

namespace ff::cuda {

// Key and value point to bytes; their strides count them. `type` is that of query and out.
struct Float8Forward : AttentionForward {
  Slopes key_scales, value_scales;  // of each key head; no data: 1
};

}  // namespace ff::cuda
