// eigenvalue_bound of a symmetric matrix that lies in shared memory.
#pragma once

#include <cmath>

#include "cuda/block_reduce.h"

namespace shampoo {

// The least of the three bounds of cpu/eigenvalue_bound.h with 1 % on it, of moderate numbers (max
// |a_ij| in [1/2, 1)); a block's threads get the same. row_sums: n doubles of shared memory.
template <class T>
__device__ double resident_bound(const T* A, int n, int leading, double* row_sums,
                                 WarpScratch<double>& scratch) {
  double trace = 0, squares = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    double sum = 0;
    for (int j = 0; j < n; ++j) {  // down a column: neighbours read neighbours
      const double x = fabs(static_cast<double>(A[j * leading + i]));
      sum += x;
      if (i != j) squares += x * x;
    }
    row_sums[i] = sum;
    trace += static_cast<double>(A[i * leading + i]);
  }
  const double mean = block_reduce<Sum>(trace, scratch) / n;
  const double off_diagonal = block_reduce<Sum>(squares, scratch);
  double minc = 0, diagonal = 0, spread = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    double product = 0;
    for (int j = 0; j < n; ++j) {
      product += fabs(static_cast<double>(A[j * leading + i])) * row_sums[j];
    }
    if (row_sums[i] > 0) minc = Max::of(minc, product / row_sums[i]);
    const double d = static_cast<double>(A[i * leading + i]);
    diagonal += d * d;
    spread += (d - mean) * (d - mean);
  }
  minc = block_reduce<Max>(minc, scratch);
  const double frobenius = sqrt(block_reduce<Sum>(diagonal, scratch) + off_diagonal);
  spread = block_reduce<Sum>(spread, scratch) + off_diagonal;
  // Near zero, 1 % of the result is less than the roundings of the sum.
  const double wolkowicz_styan = mean + sqrt(spread * (n - 1) / n) + 4 * 0x1p-52 * n * frobenius;
  const double least = fmin(fmin(frobenius, wolkowicz_styan), minc);
  return least + 0.01 * fabs(least);
}

}  // namespace shampoo
