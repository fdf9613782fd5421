// What the torch front ends of the CPU kernels share beside tensors.h.
#pragma once

#include <cstring>

#include "cpu/key_ranges.h"
#include "tensors.h"

namespace {

inline void parallel_for(int64_t tasks, void (*body)(int64_t, int64_t, const void*),
                         const void* context) {
  torch::stable::parallel_for(0, tasks, 1,
                              [=](int64_t begin, int64_t end) { body(begin, end, context); });
}

// Of an empty tensor there is no address, which memset may not be given.
inline void set_zeros(void* to, size_t bytes) {
  if (bytes > 0) std::memset(to, 0, bytes);
}

inline Tensor fill_zeros(const Tensor& t) {
  set_zeros(t.mutable_data_ptr(), size_t(t.numel() * t.element_size()));
  return t;
}

// Where packed sequences begin, of `total` rows in all, none longer than `longest`.
inline std::vector<int64_t> offsets_of(const Tensor& offsets, int64_t total, int64_t longest) {
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0 && offsets.is_cpu(),
                  "fastfusion: cu_seqlens must be (sequences + 1,) on the CPU");
  const bool narrow = offsets.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(narrow || offsets.scalar_type() == ScalarType::Long,
                  "fastfusion: cu_seqlens must be int32 or int64");
  std::vector<int64_t> values(size_t(offsets.size(0)));
  const void* data = offsets.const_data_ptr();
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t at = int64_t(i) * offsets.stride(0);
    values[i] =
        narrow ? static_cast<const int32_t*>(data)[at] : static_cast<const int64_t*>(data)[at];
    STD_TORCH_CHECK(i == 0 || (values[i] >= values[i - 1] && values[i] - values[i - 1] <= longest),
                    "fastfusion: cu_seqlens must never fall, nor rise by more than max_seqlen");
  }
  STD_TORCH_CHECK(values.front() == 0 && values.back() <= total,
                  "fastfusion: cu_seqlens must start at 0 and end within the rows");
  return values;
}

// What segments and prefixes let queries see, in memory that the call reads while it runs.
inline ff::KeyRangeTable describe_ranges(ff::Attention& p) {
  if (!p.rules.any()) return {};
  ff::KeyRangeTable table = ff::key_ranges(p);
  p.ranges = table.ranges();
  return table;
}

// The gradient of an output: the one that is given, or zeros where nothing depends on the output.
struct OutputGradient {
  Tensor tensor;

  OutputGradient(const MaybeTensor& given, const int64_t (&sizes)[4], const Tensor& query)
      : tensor(given ? *given : fill_zeros(empty_contiguous(4, sizes, kind_of(query)))) {
    STD_TORCH_CHECK(
        tensor.dim() == 4 && tensor.is_cpu() && tensor.scalar_type() == query.scalar_type(),
        "fastfusion: a gradient must be like its output");
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(tensor.size(i) == sizes[i], "fastfusion: a gradient does not fit");
  }
};

inline ff::LseGradient lse_gradient(const MaybeTensor& grad, int64_t batch, int64_t heads,
                                    int64_t length) {
  if (!grad) return {};
  STD_TORCH_CHECK(grad->dim() == 3 && grad->is_cpu() && grad->scalar_type() == ScalarType::Float &&
                      grad->size(0) == batch && grad->size(1) == heads && grad->size(2) == length,
                  "fastfusion: the gradient of a log-sum-exp must be float32 and fit");
  return {static_cast<const float*>(grad->const_data_ptr()), grad->stride(0), grad->stride(1),
          grad->stride(2)};
}

// The gradient of a mask while kernels add it up, and as a tensor afterwards.
class MaskGradientTensor {
 public:
  // `scores`: the sizes that the mask broadcasts to.
  MaskGradientTensor(const ff::Attention& p, const int64_t (&scores)[4], const MaybeTensor& mask,
                     bool wanted, Kind kind, ff::MaskGradient& gradient)
      : type_(p.mask_type) {
    if (!wanted || !mask || type_ == ff::Type::kBool) {
      const int64_t nothing[] = {0};
      tensor_ = empty_contiguous(1, nothing, kind);
      return;
    }
    tensor_ = empty_contiguous(mask->dim(), mask->sizes().data(), kind_of(*mask));
    const auto size = size_t(mask->numel());
    // One element more: an empty vector has no data and would look unwanted.
    if (mask->numel() == scores[0] * scores[1] * scores[2] * scores[3]) {
      values_.assign(size + 1, 0.0f);
      gradient.values = values_.data();
    } else {
      sums_.assign(size + 1, 0.0);
      gradient.sums = sums_.data();
    }
    int64_t strides[4];
    broadcast_strides(tensor_, scores, strides);
    gradient.batch = strides[0], gradient.head = strides[1];
    gradient.row = strides[2], gradient.column = strides[3];
  }

  // After the kernels have run.
  Tensor tensor() {
    if (!sums_.empty()) values_.assign(sums_.begin(), sums_.end());
    if (!values_.empty()) {
      ff::kernels().convert(values_.data(), tensor_.mutable_data_ptr(), type_, tensor_.numel());
    }
    return tensor_;
  }

 private:
  ff::Type type_;
  Tensor tensor_;
  std::vector<float> values_;
  std::vector<double> sums_;
};

// The gradient of sinks while kernels add it up, for each batch entry or sequence, and as a tensor
// afterwards: without numbers where there are no sinks.
class SinkGradient {
 public:
  SinkGradient(ff::AttentionBackward& p, const MaybeTensor& sinks, int64_t entries, Kind beside)
      : entries_(entries), sums_(sinks ? size_t(entries * p.heads) : 0) {
    const int64_t sizes[] = {sinks ? p.heads : 0};
    tensor_ = empty_contiguous(1, sizes, {aoti_torch_dtype_float32(), beside.device_index});
    if (sinks) p.grad_sinks = sums_.data(), p.grad_sinks_batch = p.heads;
  }

  // After the kernels have run.
  Tensor tensor() const {
    auto* to = static_cast<float*>(tensor_.mutable_data_ptr());
    const int64_t heads = tensor_.numel();
    for (int64_t h = 0; h < heads; ++h) {
      double sum = 0.0;
      for (int64_t i = 0; i < entries_; ++i) sum += sums_[size_t(i * heads + h)];
      to[h] = float(sum);
    }
    return tensor_;
  }

 private:
  int64_t entries_;
  std::vector<double> sums_;
  Tensor tensor_;
};

// Calls `kernel` and raises where it found no memory.
template <class Kernel>
inline void run(ff::Attention& p, const Kernel& kernel) {
  bool out_of_memory = false;
  p.out_of_memory = &out_of_memory;
  kernel();
  STD_TORCH_CHECK(!out_of_memory, "fastfusion: out of memory");
}

}  // namespace
