// Block power iteration, all steps in one launch: a thread block per matrix, the vectors in shared
// memory, the matrix read from global memory (the L2) once a step.
//
//   V <- orth(A V)   steps times;   then |A v| / |v| for the best v in the span of V.
//
// orth is by Cholesky: with L L^T = V^T V in double, V <- V L^-T. A column that depends on those
// before to 1e-12 (of its squared norm) becomes zero and stays it. V is thus orthonormal to about
// 1e6 roundings of T at the worst, and nearly always to a few; the estimate does not rely on it.
//
// A symmetric: W = A V is computed as A^T V, so that neighbouring threads read neighbouring
// numbers.
//
// Proven in emulation: the numbers, at n <= 48 and 257, and the barriers
// (tests/test_emulated_basis.py). Unproven until run on a GPU: speed.
#include <cmath>

#include "cuda/block_reduce.h"
#include "cuda/launchers.h"
#include "cuda/shared_memory.h"

namespace shampoo {
namespace {

constexpr int kVectors = kPowerVectors;
constexpr int kThreads = kVectors * kVectors;  // a thread per element of a Gram matrix
constexpr double kDependent = 1e-12;
constexpr int kSquarings = 10;

using Gram = double[kVectors][kVectors];

struct Scratch {
  Gram gram, other;
  double inverse[kVectors];
  WarpScratch<double> doubles;
};

// The numbers in (-1/2, 1/2) of ops/power_iteration.py: a hash of the index, in integers.
template <class T>
__device__ T start(int64_t index) {
  uint32_t x = static_cast<uint32_t>(index + 1);
  for (int round = 0; round < 2; ++round) x = (x ^ (x >> 16)) * 0x45D9F3Bu;
  return static_cast<T>(x) / static_cast<T>(4294967296.0) - static_cast<T>(0.5);
}

// gram <- V^T V.
template <class T>
__device__ void gram_of(const T* V, int n, Gram& gram) {
  const int r = threadIdx.x / kVectors, c = threadIdx.x % kVectors;
  double sum = 0;
#pragma unroll 4
  for (int i = 0; i < n; ++i) {
    sum += static_cast<double>(V[i * kVectors + r]) * static_cast<double>(V[i * kVectors + c]);
  }
  gram[r][c] = sum;
  __syncthreads();
}

// gram <- L below the diagonal, inverse <- 1 / its diagonal, 0 for a column that depends on others.
// By the first warp, a lane per row.
__device__ void cholesky(Scratch& scratch) {
  const int row = threadIdx.x;
  if (row < kWarpSize) {
    for (int j = 0; j < kVectors; ++j) {
      double rest = 0;
      if (row >= j && row < kVectors) {
        rest = scratch.gram[row][j];
        for (int k = 0; k < j; ++k) rest -= scratch.gram[row][k] * scratch.gram[j][k];
      }
      __syncwarp();
      if (row == j) {
        const bool depends = !(rest > kDependent * scratch.gram[j][j]);
        scratch.inverse[j] = depends ? 0 : 1 / sqrt(rest);
      }
      __syncwarp();
      if (row > j && row < kVectors) scratch.gram[row][j] = rest * scratch.inverse[j];
      __syncwarp();
    }
  }
  __syncthreads();
}

// V <- orth(V).
template <class T>
__device__ void orthonormalize(T* V, int n, Scratch& scratch) {
  gram_of(V, n, scratch.gram);
  cholesky(scratch);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    double v[kVectors];
    const auto L = scratch.gram + opaque(0);  // else all of it is kept in registers for all rows
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      double sum = static_cast<double>(V[i * kVectors + c]);
#pragma unroll
      for (int k = 0; k < c; ++k) sum -= v[k] * L[c][k];
      v[c] = sum * scratch.inverse[c];
    }
#pragma unroll
    for (int c = 0; c < kVectors; ++c) V[i * kVectors + c] = static_cast<T>(v[c]);
  }
  __syncthreads();
}

// V <- factor A^T V; a thread holds the new rows threadIdx.x + r kThreads, r < kRows.
template <class T, int kRows>
__device__ void multiply(const T* A, int n, int64_t row_stride, int64_t column_stride, T factor,
                         T* V) {
  T sums[kRows][kVectors] = {};
#pragma unroll 2
  for (int j = 0; j < n; ++j) {
    T a[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = threadIdx.x + r * kThreads;
      a[r] = i < n ? A[j * row_stride + i * column_stride] : T{0};
    }
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      const T v = V[j * kVectors + c];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r][c] += a[r] * v;
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int i = threadIdx.x + r * kThreads;
    if (i >= n) continue;
#pragma unroll
    for (int c = 0; c < kVectors; ++c) V[i * kVectors + c] = factor * sums[r][c];
  }
  __syncthreads();
}

// y^T gram y.
__device__ double quadratic(const Gram& gram, const double* y, WarpScratch<double>& scratch) {
  const int r = threadIdx.x / kVectors, c = threadIdx.x % kVectors;
  return block_reduce<Sum>(y[r] * gram[r][c] * y[c], scratch);
}

// scratch.inverse <- near the first eigenvector of `gram`: the largest column of gram^1024. Uses
// scratch.gram. False for a zero matrix.
__device__ bool leading_vector(const Gram& gram, Scratch& scratch) {
  const int r = threadIdx.x / kVectors, c = threadIdx.x % kVectors;
  Gram& power = scratch.gram;
  power[r][c] = gram[r][c];
  __syncthreads();
  for (int squaring = 0; squaring < kSquarings; ++squaring) {
    double trace = 0, sum = 0;  // of a positive semi-definite matrix: no entry is larger
    for (int k = 0; k < kVectors; ++k) trace += power[k][k];
    if (!(trace > 0)) return false;
    for (int k = 0; k < kVectors; ++k) sum += power[r][k] / trace * (power[k][c] / trace);
    __syncthreads();
    power[r][c] = sum;
    __syncthreads();
  }
  int best = 0;
  for (int k = 1; k < kVectors; ++k) {
    if (power[k][k] > power[best][best]) best = k;
  }
  if (c == best) scratch.inverse[r] = power[r][c];
  __syncthreads();
  return true;
}

template <class T>
__device__ double largest_entry(const T* A, int n, int64_t row_stride, int64_t column_stride,
                                WarpScratch<double>& scratch) {
  double largest = 0;
  for (int j = 0; j < n; ++j) {
    for (int i = threadIdx.x; i < n; i += kThreads) {
      largest = Max::of(largest, fabs(static_cast<double>(A[j * row_stride + i * column_stride])));
    }
  }
  return block_reduce<Max>(largest, scratch);
}

template <class T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    power_iteration_kernel(SymmetricStack<T> stack, int steps, int vectors, T* estimate) {
  __shared__ Scratch scratch;
  const int n = static_cast<int>(stack.n);
  const int64_t rows = stack.row_stride, columns = stack.column_stride, b = blockIdx.x;
  const T* A = stack.data + b * stack.block_stride;
  T* V = dynamic_shared<T>();

  double found = largest_entry(A, n, rows, columns, scratch.doubles);
  if (found > 0 && found < INFINITY) {
    constexpr int kMostExponent = sizeof(T) == sizeof(float) ? 120 : 1000;
    int exponent;
    frexp(found, &exponent);
    exponent = exponent < -kMostExponent  ? -kMostExponent
               : exponent > kMostExponent ? kMostExponent
                                          : exponent;
    const T factor = static_cast<T>(ldexp(1.0, -exponent));
    for (int at = threadIdx.x; at < n * kVectors; at += kThreads) {
      const int i = at / kVectors, c = at % kVectors;
      V[at] = c < vectors ? start<T>(int64_t{i} * vectors + c) : T{0};
    }
    __syncthreads();
    orthonormalize(V, n, scratch);
    for (int step = 0; step < steps; ++step) {
      multiply<T, kRows>(A, n, rows, columns, factor, V);
      orthonormalize(V, n, scratch);
    }
    orthonormalize(V, n, scratch);
    gram_of(V, n, scratch.other);
    const int r = threadIdx.x / kVectors, c = threadIdx.x % kVectors;
    const double before = scratch.other[r][c];
    multiply<T, kRows>(A, n, rows, columns, factor, V);
    gram_of(V, n, scratch.other);
    found = 0;
    if (leading_vector(scratch.other, scratch)) {
      const double numerator = quadratic(scratch.other, scratch.inverse, scratch.doubles);
      scratch.other[r][c] = before;
      __syncthreads();
      const double denominator = quadratic(scratch.other, scratch.inverse, scratch.doubles);
      found = denominator > 0 ? ldexp(sqrt(numerator / denominator), exponent) : 0;
    }
  } else {
    found = found == 0 ? 0 : NAN;
  }
  if (threadIdx.x == 0) estimate[b] = static_cast<T>(found);
}

}  // namespace

template <class T>
cudaError_t power_iteration_cuda(const SymmetricStack<T>& stack, int steps, int64_t vectors,
                                 T* estimate, cudaStream_t stream) {
  const int64_t n = stack.n, bytes = n * kVectors * static_cast<int64_t>(sizeof(T));
  const bool fits = bytes + static_cast<int64_t>(sizeof(Scratch)) <= shared_memory_limit();
  const int64_t columns = vectors < n ? vectors : n;
  if (n < 1 || n > kPowerMostN || !fits || columns < 1 || columns > kVectors) {
    return cudaErrorInvalidValue;
  }
  SymmetricStack<T> coalesced = stack;
  if (stack.row_stride < stack.column_stride) {
    coalesced.row_stride = stack.column_stride;
    coalesced.column_stride = stack.row_stride;
  }
  const auto kernel = n <= kThreads ? power_iteration_kernel<T, 1>
                                    : power_iteration_kernel<T, kPowerMostN / kThreads>;
  return launch(kernel, stack.blocks, kThreads, bytes, stream, coalesced, steps,
                static_cast<int>(columns), estimate);
}

template cudaError_t power_iteration_cuda(const SymmetricStack<float>&, int, int64_t, float*,
                                          cudaStream_t);
template cudaError_t power_iteration_cuda(const SymmetricStack<double>&, int, int64_t, double*,
                                          cudaStream_t);

}  // namespace shampoo
