// What the torch front ends of the CUDA kernels share. With FF_CUDA_EMULATED the kernels run on the
// host, and the same ops take CPU tensors.
#pragma once

#ifdef FF_CUDA_EMULATED
#define FF_DEVICE_KEY CPU  // of torch's dispatcher
#else
#define FF_DEVICE_KEY CUDA
#define FF_TORCH_CUDA
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#endif
#include "tensors.h"

#include "cuda/api.h"

namespace {

namespace cuda = ff::cuda;

constexpr int64_t kMaxDim = 256, kAlignment = 256;

// Makes a device the current one, which is where launchers launch.
class Device {
 public:
#ifdef FF_TORCH_CUDA
  explicit Device(int32_t index) : index_(index), guard_(index) {}

  void* stream() const {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }
#else
  explicit Device(int32_t) {}
  void* stream() const { return nullptr; }
#endif

  explicit Device(const Tensor& query) : Device(checked_index(query)) {}

 private:
  static int32_t checked_index(const Tensor& query) {
    STD_TORCH_CHECK(is_here(query, query), "fastfusion: query is not where the kernels run");
    return device_index(query);
  }

#ifdef FF_TORCH_CUDA
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

struct Workspace {
  Tensor memory;
  void* data = nullptr;  // null where a call needs none

  Workspace(int64_t bytes, const Tensor& query) {
    if (bytes == 0) return;
    const int64_t sizes[] = {bytes + kAlignment};
    memory = empty_contiguous(1, sizes, {aoti_torch_dtype_uint8(), device_index(query)});
    const auto address = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
    data = reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
};

inline void check_launch(const char* error) { STD_TORCH_CHECK(!error, "fastfusion: ", error); }

// What the launchers take for granted; returns the compute capability.
inline int check_kernels(ff::Attention& p) {
  STD_TORCH_CHECK(p.head_dim <= kMaxDim && p.value_dim <= kMaxDim, "fastfusion: head dims above ",
                  kMaxDim, " have no CUDA kernel");
  // Of a head dim of 1 torch leaves the stride open.
  p.query.column = p.key.column = p.value.column = 1;
  const int capability = cuda::current_capability();
  STD_TORCH_CHECK(cuda::runs(p.type, capability),
                  "fastfusion: no CUDA kernel of this dtype for "
                  "compute capability ",
                  capability / 10, ".", capability % 10);
  return capability;
}

}  // namespace
