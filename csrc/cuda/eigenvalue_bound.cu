// One thread block per matrix, three passes over its lower triangle: the largest entry, the row
// sums of |A|, and |A| times those. The formulas, and why double: cpu/eigenvalue_bound.h.
//
// Proven in emulation: the numbers, at n <= 130, and the barriers (tests/test_emulated.py).
// Unproven until run on a GPU: speed.
#include <cmath>

#include "cuda/block_reduce.h"
#include "cuda/launchers.h"

namespace shampoo {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kFewThreads = 64;
constexpr int kLaneColumns = 4;
constexpr int kColumns = kLaneColumns * kWarpSize;
constexpr int64_t kMostThreadBlocks = 1024;  // bounds the workspace; more matrices take turns

template <class T>
struct Matrix {
  const T* data;
  int64_t n, row_stride, column_stride;

  __device__ double at(int64_t i, int64_t j) const {
    return static_cast<double>(data[i * row_stride + j * column_stride]);
  }
};

template <class T>
__device__ double largest_entry(const Matrix<T>& A, WarpScratch<double>& scratch) {
  double largest = 0;
  const int64_t warps = blockDim.x / kWarpSize;
  for (int64_t i = threadIdx.x / kWarpSize; i < A.n; i += warps) {
    for (int64_t j = threadIdx.x % kWarpSize; j <= i; j += kWarpSize) {
      largest = Max::of(largest, fabs(A.at(i, j)));
    }
  }
  return block_reduce<Max>(largest, scratch);
}

// y <- |A| x / scale, for x >= 0; returns sum_{i > j} (a_ij / scale)^2. Warps take rows i of a
// strip of columns j < i. A row's part of y is summed over the lanes, a column's in registers, then
// over the warps: each y has one writer at a time, so that no atomics are needed and bits do not
// vary.
template <class T>
__device__ double multiply(const Matrix<T>& A, double scale, const double* x, double* y,
                           double (&column_sums)[kWarps][kColumns], WarpScratch<double>& scratch) {
  const int warps = blockDim.x / kWarpSize;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  double squares = 0;
  for (int64_t i = threadIdx.x; i < A.n; i += blockDim.x) y[i] = fabs(A.at(i, i)) / scale * x[i];
  for (int64_t start = 0; start < A.n; start += kColumns) {
    double column[kLaneColumns] = {};
    __syncthreads();
    for (int64_t i = start + 1 + warp; i < A.n; i += warps) {
      double row = 0;
      for (int c = 0; c < kLaneColumns; ++c) {
        const int64_t j = start + c * kWarpSize + lane;
        if (j >= i) continue;
        const double entry = fabs(A.at(i, j)) / scale;
        row += entry * x[j];
        column[c] += entry * x[i];
        squares += entry * entry;
      }
      row = warp_reduce<Sum>(row);
      if (lane == 0) y[i] += row;
    }
    for (int c = 0; c < kLaneColumns; ++c) column_sums[warp][c * kWarpSize + lane] = column[c];
    __syncthreads();
    for (int j = threadIdx.x; j < kColumns && start + j < A.n; j += blockDim.x) {
      for (int w = 0; w < warps; ++w) y[start + j] += column_sums[w][j];
    }
  }
  return block_reduce<Sum>(squares, scratch);  // synchronises: all of y is visible
}

template <class T>
__device__ double bound_of(const Matrix<T>& A, double* sums, double* products) {
  __shared__ WarpScratch<double> scratch;
  __shared__ double column_sums[kWarps][kColumns];
  const double scale = largest_entry(A, scratch);
  if (!(scale > 0 && scale < INFINITY)) return scale;

  for (int64_t i = threadIdx.x; i < A.n; i += blockDim.x) products[i] = 1;
  __syncthreads();
  const double off_diagonal = 2 * multiply(A, scale, products, sums, column_sums, scratch);
  multiply(A, scale, sums, products, column_sums, scratch);

  double trace = 0, squares = 0, minc = 0;
  for (int64_t i = threadIdx.x; i < A.n; i += blockDim.x) {
    const double entry = A.at(i, i) / scale;
    trace += entry;
    squares += entry * entry;
    if (sums[i] > 0) minc = Max::of(minc, products[i] / sums[i]);
  }
  const double n = static_cast<double>(A.n);
  const double mean = block_reduce<Sum>(trace, scratch) / n;
  double spread = 0;
  for (int64_t i = threadIdx.x; i < A.n; i += blockDim.x) {
    const double deviation = A.at(i, i) / scale - mean;
    spread += deviation * deviation;
  }
  minc = block_reduce<Max>(minc, scratch);
  const double frobenius = sqrt(block_reduce<Sum>(squares, scratch) + off_diagonal);
  spread = block_reduce<Sum>(spread, scratch) + off_diagonal;
  // Near zero, 1 % of the result is less than the roundings of the sum.
  const double wolkowicz_styan = mean + sqrt(spread * (n - 1) / n) + 4 * 0x1p-52 * n * frobenius;
  const double least = fmin(fmin(frobenius, wolkowicz_styan), minc);
  return (least + 0.01 * fabs(least)) * scale;
}

template <class T>
__device__ T round_up(double x) {
  const T nearest = static_cast<T>(x);
  return static_cast<double>(nearest) < x ? std::nextafter(nearest, static_cast<T>(INFINITY))
                                          : nearest;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    eigenvalue_bound_kernel(SymmetricStack<T> stack, double* workspace, T* bound) {
  double* sums = workspace + blockIdx.x * 2 * stack.n;
  for (int64_t b = blockIdx.x; b < stack.blocks; b += gridDim.x) {
    const Matrix<T> A{stack.data + b * stack.block_stride, stack.n, stack.row_stride,
                      stack.column_stride};
    const double result = bound_of(A, sums, sums + stack.n);
    if (threadIdx.x == 0) bound[b] = round_up<T>(result);
  }
}

int64_t thread_blocks(int64_t blocks) {
  return blocks < kMostThreadBlocks ? blocks : kMostThreadBlocks;
}

}  // namespace

int64_t eigenvalue_bound_workspace(int64_t blocks, int64_t n) {
  return thread_blocks(blocks) * 2 * n;
}

template <class T>
cudaError_t eigenvalue_bound_cuda(const SymmetricStack<T>& stack, double* workspace, T* bound,
                                  cudaStream_t stream) {
  if (stack.blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(thread_blocks(stack.blocks)));
  // Small matrices take fewer threads each, so that a multiprocessor holds more of them.
  config.blockDim = dim3(stack.n <= kFewThreads ? kFewThreads : kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, eigenvalue_bound_kernel<T>, stack, workspace, bound);
}

template cudaError_t eigenvalue_bound_cuda(const SymmetricStack<float>&, double*, float*,
                                           cudaStream_t);
template cudaError_t eigenvalue_bound_cuda(const SymmetricStack<double>&, double*, double*,
                                           cudaStream_t);

}  // namespace shampoo
