// The kernels of an instruction set, for <name>.cpp, which includes a vector type before.
#pragma once

#include "cpu/attention/attention.h"
#include "cpu/attention/weight_statistics.h"
#include "cpu/bidirectional/backward.h"
#include "cpu/bidirectional/forward.h"
#include "cpu/gemm/peak.h"
#include "cpu/layers/cross_layers.h"
#include "cpu/layers/decoder_layer.h"
#include "cpu/layers/encoder_layer.h"

namespace ff {
namespace {

// `HalfMath` is how bfloat16 operands are multiplied; others are converted to float32, of which
// `HalfMath::kFloat32` has the kernels where these are not they.
template <class HalfMath = Float32Math>
constexpr KernelTable table(const char* isa) {
  return {isa,
          Vec::kLanes,
          attention_forward<HalfMath>,
          attention_path<HalfMath>,
          attention_splits,
          attention_backward<HalfMath>,
          attention_parts<HalfMath>,
          attention_part<HalfMath>,
          attention_backward_part<HalfMath>,
          weight_statistics<HalfMath>,
          bidirectional_forward<HalfMath>,
          bidirectional_backward<HalfMath>,
          linear<HalfMath>,
          norm,
          encoder_layer<HalfMath>,
          decoder_layer<HalfMath>,
          cross_attention_layer<HalfMath>,
          cross_modal_layer<HalfMath>,
          peak_operations<HalfMath>,
          convert};
}

}  // namespace
}  // namespace ff
