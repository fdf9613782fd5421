// All that a kernel may use of a GPU. nvcc compiles kernels against device_ptx.h; a C++ compiler
// compiles the same source against emulate/device.h and runs it on the host, for tests.
//
//   FF_DEVICE                            in front of device functions
//   FF_KERNEL(threads)                   in front of kernels, instead of void
//   FF_KERNEL_BESIDE(threads, blocks)    the same, with registers left for so many blocks at once
//   FF_ARCH                              compute capability (80); only in kernels
//   has_mma<T>()                         whether FF_ARCH multiplies matrices of T
//
//   thread_index, lane_index, warp_index, block_index, block_count         all one-dimensional
//   Shared::take<T>(count)               dynamic shared memory, array after array
//   barrier, barrier_warp, fence         of a block, of a warp, between blocks
//   shuffle_xor, shuffle, ballot         4 bytes from another lane, a bit of each; whole warps
//   load_matrix4, ..._transposed         four 8x8 matrices of 16-bit values
//   mma<T>                               16x8 += 16x16 times 16x8
//   copy_async16, commit_copies, wait_copies<N>
//   rounded_product                      of floats, and never a part of fmaf
//   log2, reciprocal                     to 1 or 2 units in the last place, for numbers near 1
//   unpack_float8<T>                     two 8-bit floats; has_float8() says whether FF_ARCH can
//   exp2, pack<T>, low<T>, high<T>, to_float, from_float<T>, add_atomic
//
//   launch<kernel>(Launch, arguments...), compute_capability, shared_limit, shared_bytes<T>   host
//
// Where a program links emulated kernels of two FF_ARCH, they stand in unnamed namespaces.
#pragma once

#include "launch.h"

#ifdef __CUDACC__
#include "device_ptx.h"
#else
#include "emulate/device.h"
#endif
