// The functions of device.h as PTX.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <type_traits>

#define FF_DEVICE __device__ __forceinline__
#define FF_KERNEL(threads) FF_KERNEL_BESIDE(threads, 1)
#define FF_KERNEL_BESIDE(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

// nvcc reads kernels once more for the host, where it discards their bodies.
#ifdef __CUDA_ARCH__
#define FF_ARCH (__CUDA_ARCH__ / 10)
#else
#define FF_ARCH 0
#endif

namespace ff::cuda {

// A kernel of BFloat16 that is compiled for sm_75 as well has to be empty there.
template <class T>
constexpr bool has_mma() {
  return std::is_same_v<T, Half> || FF_ARCH >= 80;
}

FF_DEVICE int thread_index() { return int(threadIdx.x); }
FF_DEVICE int lane_index() { return int(threadIdx.x % 32); }
FF_DEVICE int warp_index() { return int(threadIdx.x / 32); }
FF_DEVICE int64_t block_index() { return blockIdx.x; }
FF_DEVICE int64_t block_count() { return gridDim.x; }

class Shared {
 public:
  template <class T>
  FF_DEVICE T* take(int count) {
    extern __shared__ __align__(kSharedAlignment) unsigned char ff_shared_memory[];
    T* array = reinterpret_cast<T*>(ff_shared_memory + used_);
    used_ += shared_bytes<T>(count);
    return array;
  }

 private:
  int used_ = 0;
};

FF_DEVICE void barrier() { __syncthreads(); }
FF_DEVICE void barrier_warp() { __syncwarp(); }
FF_DEVICE void fence() { __threadfence(); }

template <class T>
FF_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
FF_DEVICE T shuffle(T value, int from_lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(0xffffffffu, value, from_lane);
}

// Bit by bit, for which lanes it is true; whole warps.
FF_DEVICE uint32_t ballot(bool mine) { return __ballot_sync(0xffffffffu, mine); }

FF_DEVICE uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// "memory": plain stores to the rows must not move below it.
FF_DEVICE void load_matrix4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

FF_DEVICE void load_matrix4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Half of the product below sm_80. The products are volatile so that none sinks into a branch that
// a part of the warp takes.
FF_DEVICE void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}

template <class T>
FF_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
  static_assert(has_mma<T>() || FF_ARCH == 0, "BFloat16 needs sm_80");
  if constexpr (FF_ARCH < 80) {
    mma_m16n8k8(c, a[0], a[1], b0);
    mma_m16n8k8(c, a[2], a[3], b1);
  } else if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

FF_DEVICE void copy_async16(void* shared, const void* global, bool valid) {
#if FF_ARCH >= 80
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(shared) =
      valid ? __ldg(static_cast<const uint4*>(global)) : make_uint4(0, 0, 0, 0);
#endif
}

FF_DEVICE void commit_copies() {
#if FF_ARCH >= 80
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most the last `kPending` groups of the thread's copies are on their way.
template <int kPending>
FF_DEVICE void wait_copies() {
#if FF_ARCH >= 80
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

FF_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FF_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FF_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FF_DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

FF_DEVICE float to_float(float x) { return x; }
FF_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FF_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
FF_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, Half>) {
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    BFloat16 y;
#if FF_ARCH >= 80
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const uint32_t bits = __float_as_uint(x);
    y.bits = (bits & 0x7fffffffu) > 0x7f800000u
                 ? uint16_t(0x7fff)
                 : uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
#endif
    return y;
  }
}

template <class T>
FF_DEVICE uint32_t pack(float low, float high) {
#if FF_ARCH >= 80
  uint32_t both;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#else
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
FF_DEVICE float low(uint32_t both) {
  return to_float(T{uint16_t(both & 0xffffu)});
}

template <class T>
FF_DEVICE float high(uint32_t both) {
  return to_float(T{uint16_t(both >> 16)});
}

constexpr bool has_float8() { return FF_ARCH >= 89; }

// Two 8-bit floats (E4M3), exactly.
template <class T>
FF_DEVICE uint32_t unpack_float8(uint16_t two) {
  uint32_t halves = 0;
#if FF_ARCH >= 89
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
#endif
  if constexpr (std::is_same_v<T, Half>) return halves;
  return pack<T>(low<Half>(halves), high<Half>(halves));
}

FF_DEVICE unsigned add_atomic(unsigned* address, unsigned value) {
  return atomicAdd(address, value);
}

// What is known of a device is kept for this many, and asked for each time of others.
constexpr int kDevices = 64;

// Of the current device; 0 where there is none.
inline int compute_capability() {
  static std::atomic<int> known[kDevices];
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kDevices) {
    if (const int capability = known[device].load(std::memory_order_relaxed)) return capability;
  }
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next caller would find it
    return 0;
  }
  if (device < kDevices) known[device].store(10 * major + minor, std::memory_order_relaxed);
  return 10 * major + minor;
}

// Lets a kernel have all shared memory of the current device. Threads that meet here do the same.
template <auto kKernel>
cudaError_t raise_shared_limit() {
  static std::atomic<bool> raised[kDevices];
  int device = 0, bytes = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && raised[device].load(std::memory_order_relaxed)) return cudaSuccess;
  cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < kDevices)
    raised[device].store(true, std::memory_order_relaxed);
  return error;
}

// Starts a kernel; null, or what is wrong.
template <auto kKernel, class... Args>
const char* launch(const Launch& launch, const Args&... args) {
  if (launch.blocks == 0) return nullptr;
  if (launch.blocks < 0 || launch.blocks > 0x7fffffff) return "more blocks than a grid can have";
  if (launch.shared_bytes > 48 << 10) {
    if (const cudaError_t error = raise_shared_limit<kKernel>()) {
      cudaGetLastError();
      return cudaGetErrorString(error);
    }
  }
  kKernel<<<unsigned(launch.blocks), unsigned(launch.threads), size_t(launch.shared_bytes),
            static_cast<cudaStream_t>(launch.stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ff::cuda
