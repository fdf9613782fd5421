// Cross attention of 20 queries over 36 keys on a GPU, without Python and without torch: 12 heads
// of 64 in float16, checked against a loop in double on the host, and timed.
//
// README: `.venv/bin/python setup.py build_ext --inplace --cuda` builds the library; then, here,
//   nvcc -std=c++20 -I.. attention.cpp -L../../fastfusion -lfastfusion_cuda
//     -Xlinker -rpath=../../fastfusion -o attention && ./attention
// A C++ compiler will do as well, with -I and -L of the toolkit and -lcudart.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/api.h"

namespace {

constexpr int kHeads = 12, kQueries = 20, kKeys = 36, kDim = 64;

[[noreturn]] void stop(const char* what, const char* why) {
  std::fprintf(stderr, "%s: %s\n", what, why);
  std::exit(1);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) stop(what, cudaGetErrorString(error));
}

double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                           : exponent == 31 ? (fraction ? NAN : INFINITY)
                                            : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 ? -magnitude : magnitude;
}

// float16 numbers between -2 and 2, and where they lie on the device: rows of all heads in
// sequence, as a projection writes them. Head h of row i begins at (i * kHeads + h) * kDim.
struct Operand {
  std::vector<uint16_t> host;
  void* device = nullptr;

  explicit Operand(int rows) : host(size_t(rows) * kHeads * kDim) {
    check(cudaMalloc(&device, bytes()), "cudaMalloc");
  }
  Operand(const Operand&) = delete;
  ~Operand() { cudaFree(device); }

  size_t bytes() const { return host.size() * sizeof(uint16_t); }
  double at(int row, int head, int column) const {
    return half_to_double(host[(size_t(row) * kHeads + size_t(head)) * kDim + size_t(column)]);
  }
  ff::View view() const { return {device, 0, kDim, kHeads * kDim, 1}; }

  void fill(uint32_t* seed) {
    for (uint16_t& x : host) {
      *seed = *seed * 1664525u + 1013904223u;
      x = uint16_t(*seed >> 16 & 0x83ffu) | uint16_t((*seed >> 13 & 1u ? 15 : 14) << 10);
    }
    check(cudaMemcpy(device, host.data(), bytes(), cudaMemcpyHostToDevice), "copy to the device");
  }
};

// The largest difference between what the device gave and the formula in double.
double largest_error(const Operand& query, const Operand& key, const Operand& value,
                     const Operand& out, double scale) {
  double largest = 0;
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kQueries; ++i) {
      double weights[kKeys], sum = 0, maximum = -INFINITY;
      for (int j = 0; j < kKeys; ++j) {
        double score = 0;
        for (int d = 0; d < kDim; ++d) score += query.at(i, h, d) * key.at(j, h, d);
        weights[j] = score * scale;
        maximum = std::fmax(maximum, weights[j]);
      }
      for (double& weight : weights) sum += weight = std::exp(weight - maximum);
      for (int d = 0; d < kDim; ++d) {
        double mean = 0;
        for (int j = 0; j < kKeys; ++j) mean += weights[j] / sum * value.at(j, h, d);
        const double error = std::fabs(out.at(i, h, d) - mean);
        if (!(error <= largest)) largest = error;  // a NaN as well
      }
    }
  }
  return largest;
}

// Microseconds of a launch among many.
double time_launch(const ff::AttentionForward& call, void* workspace, cudaStream_t stream) {
  constexpr int kLaunches = 1000;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  for (int i = -100; i < kLaunches; ++i) {
    if (i == 0) check(cudaEventRecord(begin, stream), "cudaEventRecord");
    if (const char* error = ff::cuda::attention_forward(call, workspace, stream))
      stop("attention_forward", error);
  }
  check(cudaEventRecord(end, stream), "cudaEventRecord");
  check(cudaEventSynchronize(end), "cudaEventSynchronize");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return 1e3 * double(milliseconds) / kLaunches;
}

int run(int capability) {
  Operand query(kQueries), key(kKeys), value(kKeys), out(kQueries);
  uint32_t seed = 1;
  query.fill(&seed);
  key.fill(&seed);
  value.fill(&seed);

  ff::AttentionForward call{};
  call.batch = 1;
  call.heads = call.kv_heads = kHeads;
  call.q_len = kQueries;
  call.kv_len = kKeys;
  call.head_dim = call.value_dim = kDim;
  call.type = ff::Type::kFloat16;
  call.query = query.view();
  call.key = key.view();
  call.value = value.view();
  call.out = {out.device, 0, kDim, kHeads * kDim, 1};
  call.scale = 1.0f / std::sqrt(float(kDim));

  void* workspace = nullptr;
  if (const int64_t bytes = ff::cuda::attention_workspace(call, capability))
    check(cudaMalloc(&workspace, size_t(bytes)), "cudaMalloc");
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  if (const char* error = ff::cuda::attention_forward(call, workspace, stream))
    stop("attention_forward", error);
  check(cudaStreamSynchronize(stream), "attention");
  check(cudaMemcpy(out.host.data(), out.device, out.bytes(), cudaMemcpyDeviceToHost),
        "copy to the host");

  const double error = largest_error(query, key, value, out, double(call.scale));
  const bool right = error < 2e-3;  // two roundings to float16 of means up to 2
  std::printf("largest error: %.2g (%s)\n", error, right ? "right" : "WRONG");
  std::printf("a launch: %.2f us (%s)\n", time_launch(call, workspace, stream),
              ff::cuda::attention_path(call, capability));
  cudaStreamDestroy(stream);
  cudaFree(workspace);
  return right ? 0 : 1;
}

}  // namespace

int main() {
  const int capability = ff::cuda::current_capability();
  if (capability == 0) {
    std::printf("no CUDA device here: nothing was computed\n");
    return 0;
  }
  if (!ff::cuda::runs(ff::Type::kFloat16, capability)) {
    std::printf("no kernels for compute capability %d.%d\n", capability / 10, capability % 10);
    return 0;
  }
  std::printf("%d queries, %d keys, %d heads of %d in float16 on compute capability %d.%d\n",
              kQueries, kKeys, kHeads, kDim, capability / 10, capability % 10);
  return run(capability);
}
