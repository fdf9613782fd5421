// Attention forward of a 16-bit type: which kernels run.
#pragma once

#include "short.cuh"
#include "tiles.cuh"

namespace ff::cuda {
namespace {

template <class T, class Call>
const char* attention_half(const Call& p, int capability, void* workspace, void* stream) {
  if (const auto plan = short_plan(p, capability)) return run_short<T>(p, *plan, workspace, stream);
  return run_tiles<T>(p, capability, stream);
}

}  // namespace
}  // namespace ff::cuda
