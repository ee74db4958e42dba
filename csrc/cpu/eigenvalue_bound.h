// A strict upper bound on the largest eigenvalue of one symmetric matrix.
#pragma once

#include <cstdint>

namespace shampoo {

// With x = lower triangle of A, mirrored, m = tr(A)/n:
//   Frobenius             |A|_F
//   Wolkowicz-Styan 1980  m + s sqrt(n - 1),  s^2 = |A - m I|_F^2 / n
//   Minc 1988             max_i sum_j |a_ij| r_j / r_i,  r_i = sum_j |a_ij|, over rows with r_i > 0
// Each is an upper bound in exact arithmetic; in floating point they fail by a few roundings on
// nearly flat spectra. All sums are in double, s is centred, and the least of the three, b, is
// returned as b + 0.01 |b|, which is more than any rounding and is upwards for b < 0 too.
//
// NaN gives NaN, else Inf gives Inf; n = 0 gives 0. T: float, double. `workspace` holds 3 n
// doubles.
template <class T>
double bound_block(const T* a, int64_t n, int64_t row_stride, int64_t column_stride,
                   double* workspace);

}  // namespace shampoo
