// Reductions over a warp and over a thread block, in an order that depends on blockDim alone.
#pragma once

#include <cuda_runtime.h>

namespace shampoo {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = 8;

struct Sum {
  static __device__ double of(double a, double b) { return a + b; }
};

struct Max {  // with NaN above everything, unlike fmax
  static __device__ double of(double a, double b) { return b > a || b != b ? b : a; }
};

// Every lane gets the result.
template <class Op>
__device__ double warp_reduce(double value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Every thread gets the result. Synchronises before and after its use of `scratch`.
template <class Op>
__device__ double block_reduce(double value, double (&scratch)[kMaxWarps]) {
  value = warp_reduce<Op>(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double result = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) {
    result = Op::of(result, scratch[warp]);
  }
  __syncthreads();
  return result;
}

}  // namespace shampoo
