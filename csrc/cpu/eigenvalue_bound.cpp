#include "eigenvalue_bound.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace shampoo {
namespace {

// The lower triangle row by row, and its numbers as doubles of moderate size.
template <class T>
class Rows {
 public:
  Rows(const T* a, int64_t row_stride, int64_t column_stride, T* row)
      : a_(a), row_stride_(row_stride), column_stride_(column_stride), row_(row) {}

  // a_ij for j < i, contiguous.
  const T* operator[](int64_t i) const {
    const T* from = a_ + i * row_stride_;
    if (column_stride_ == 1) return from;
    for (int64_t j = 0; j < i; ++j) row_[j] = from[j * column_stride_];
    return row_;
  }
  T diagonal(int64_t i) const { return a_[i * (row_stride_ + column_stride_)]; }

  // The squares of float32 numbers fit double; float64 numbers are scaled so that theirs do.
  void scale(int exponent) { factor_ = std::ldexp(1.0, -exponent); }
  double operator()(T x) const { return sizeof(T) == sizeof(float) ? double(x) : x * factor_; }

 private:
  const T* a_;
  int64_t row_stride_, column_stride_;
  T* row_;
  double factor_ = 1;
};

// Partial sums per quantity: a single one would wait for every addition before the next.
constexpr int kLanes = 4;
using Lanes = double[kLanes];

double total(const Lanes& x) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}

// r_i = sum_j |a_ij| from each element of the lower triangle once; returns |A - diag(A)|_F^2.
template <class T>
double row_sums(const Rows<T>& rows, int64_t n, double* __restrict r) {
  std::fill(r, r + n, 0.0);
  Lanes squares = {};
  for (int64_t i = 0; i < n; ++i) {
    const T* __restrict row = rows[i];
    Lanes sums = {};
    int64_t j = 0;
    for (; j + kLanes <= i; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const double x = std::abs(rows(row[j + l]));
        sums[l] += x;
        squares[l] += x * x;
        r[j + l] += x;
      }
    }
    for (; j < i; ++j) {
      const double x = std::abs(rows(row[j]));
      sums[0] += x;
      squares[0] += x * x;
      r[j] += x;
    }
    r[i] = total(sums) + std::abs(rows(rows.diagonal(i)));
  }
  return 2 * total(squares);
}

// max_i (|A| r)_i / r_i, given r.
template <class T>
double minc(const Rows<T>& rows, int64_t n, const double* __restrict r,
            double* __restrict product) {
  std::fill(product, product + n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const T* __restrict row = rows[i];
    const double r_i = r[i];
    Lanes sums = {};
    int64_t j = 0;
    for (; j + kLanes <= i; j += kLanes) {
      for (int l = 0; l < kLanes; ++l) {
        const double x = std::abs(rows(row[j + l]));
        sums[l] += x * r[j + l];
        product[j + l] += x * r_i;
      }
    }
    for (; j < i; ++j) {
      const double x = std::abs(rows(row[j]));
      sums[0] += x * r[j];
      product[j] += x * r_i;
    }
    product[i] = total(sums) + std::abs(rows(rows.diagonal(i))) * r_i;
  }
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (r[i] > 0) largest = std::max(largest, product[i] / r[i]);
  }
  return largest;
}

// max |a_ij|, or the NaN or Inf among them.
template <class T>
double largest_magnitude(const Rows<T>& rows, int64_t n) {
  double largest = 0;
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    const T* row = rows[i];
    for (int64_t j = 0; j <= i; ++j) {
      const double x = std::abs(double(j < i ? row[j] : rows.diagonal(i)));
      nan |= x != x;
      largest = std::max(largest, x);
    }
  }
  return nan ? std::numeric_limits<double>::quiet_NaN() : largest;
}

}  // namespace

template <class T>
double bound_block(const T* a, int64_t n, int64_t row_stride, int64_t column_stride,
                   double* workspace) {
  if (n == 0) return 0;
  double *r = workspace, *product = workspace + n;
  Rows<T> rows(a, row_stride, column_stride, reinterpret_cast<T*>(workspace + 2 * n));

  int exponent = 0;
  if constexpr (sizeof(T) == sizeof(double)) {
    const double largest = largest_magnitude(rows, n);
    if (!std::isfinite(largest)) return largest;
    std::frexp(largest, &exponent);
    exponent = std::clamp(exponent, -1000, 1000);  // 2^-exponent must be a normal number
    rows.scale(exponent);
  }

  const double off_diagonal = row_sums(rows, n, r);
  double mean = 0, diagonal = 0, centred = 0;
  for (int64_t i = 0; i < n; ++i) mean += rows(rows.diagonal(i)) / double(n);
  for (int64_t i = 0; i < n; ++i) {
    const double d = rows(rows.diagonal(i));
    diagonal += d * d;
    centred += (d - mean) * (d - mean);
  }
  const double frobenius = std::sqrt(off_diagonal + diagonal);
  if (!std::isfinite(frobenius)) return largest_magnitude(rows, n);
  const double deviation = std::sqrt((off_diagonal + centred) / double(n));
  // Near zero, 1 % of the result is less than the roundings of the sum.
  const double rounding = 4 * std::numeric_limits<double>::epsilon() * double(n) * frobenius;
  const double wolkowicz_styan = mean + deviation * std::sqrt(double(n - 1)) + rounding;
  const double bound = std::min({frobenius, wolkowicz_styan, minc(rows, n, r, product)});
  return std::ldexp(bound + 0.01 * std::abs(bound), exponent);
}

template double bound_block(const float*, int64_t, int64_t, int64_t, double*);
template double bound_block(const double*, int64_t, int64_t, int64_t, double*);

template <class T>
void eigenvalue_bound(const SymmetricStack<T>& stack, T* bound, const Parallel& parallel) {
  const int64_t grain = 1 + 65536 / std::max<int64_t>(stack.n * stack.n, 1);
  for_each(parallel, stack.blocks, grain, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    auto* workspace = static_cast<double*>(scratch.reserve(3 * stack.n * sizeof(double)));
    for (int64_t b = begin; b < end; ++b) {
      const double exact = bound_block(stack.data + b * stack.block_stride, stack.n,
                                       stack.row_stride, stack.column_stride, workspace);
      const T nearest = T(exact);
      const bool below = double(nearest) < exact;
      bound[b] = below ? std::nextafter(nearest, std::numeric_limits<T>::infinity()) : nearest;
    }
  });
}

template void eigenvalue_bound(const SymmetricStack<float>&, float*, const Parallel&);
template void eigenvalue_bound(const SymmetricStack<double>&, double*, const Parallel&);

}  // namespace shampoo
