// Reductions over a warp and over a thread block, in an order that depends on blockDim alone.
#pragma once

#include <cuda_runtime.h>

namespace shampoo {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 16;

template <class T>
using WarpScratch = T[kMaxWarps];

struct Sum {
  template <class T>
  static __device__ T of(T a, T b) {
    return a + b;
  }
};

struct Max {  // with NaN above everything, unlike fmax
  template <class T>
  static __device__ T of(T a, T b) {
    return b > a || b != b ? b : a;
  }
};

// Every lane gets the result.
template <class Op, class T>
__device__ T warp_reduce(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Every thread gets the result. Synchronises before and after its use of `scratch`.
template <class Op, class T>
__device__ T block_reduce(T value, WarpScratch<T>& scratch) {
  value = warp_reduce<Op>(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T result = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) {
    result = Op::of(result, scratch[warp]);
  }
  __syncthreads();
  return result;
}

}  // namespace shampoo
