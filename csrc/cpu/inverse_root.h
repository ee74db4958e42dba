// What the inverse roots have in common: the scaled block, and what a block without a root gets.
//
// A block is scaled by a power of two to max |a_ij| in [1/2, 1) first, so that squares neither
// overflow nor vanish; only its lower triangle is read.
//
// A block without a root gets
//   previous[b]            where there is one and it is finite: KEPT_PREVIOUS,
//   bound^(-1/p) I         where that is finite and positive: FAILED,
//   I                      else: FAILED.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../kernels.h"
#include "eigenvalue_bound.h"

namespace shampoo {

template <class T>
bool all_finite(const T* a, int64_t n, int64_t row_stride, int64_t column_stride) {
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      finite &= std::isfinite(a[i * row_stride + j * column_stride]);
    }
  }
  return finite;
}

// The largest |x|; NaN if there is one, else Inf if there is one. In integers, all pairs of which
// are ordered, so that it runs in vectors.
template <class T>
T largest_magnitude(const T* x, int64_t count) {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Bits largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof(T));
    largest = std::max<Bits>(largest, bits & std::numeric_limits<Bits>::max());
  }
  T result;
  std::memcpy(&result, &largest, sizeof(T));
  return result;
}

// The lower triangle of 2^-exponent scale A, and its bound (NaN or Inf where A is not finite).
template <class T>
struct ScaledBlock {
  int exponent = 0;
  double bound = 0;

  // Element (i, j), j <= i, goes to lower[i n + j], or where `by_columns` to lower[i + j n];
  // workspace: 3 n doubles.
  ScaledBlock(const InverseRoot<T>& problem, int64_t b, T* lower, bool by_columns,
              double* workspace) {
    const SymmetricStack<T>& stack = problem.A;
    const double scale = problem.scale ? double(problem.scale[b * problem.scale_stride]) : 1.0;
    const int64_t n = stack.n;
    const int64_t row_stride = by_columns ? 1 : n, column_stride = by_columns ? n : 1;
    const T* a = stack.data + b * stack.block_stride;
    // In squares, because one side may be read or written against the grain.
    constexpr int64_t kSquare = 32;
    for (int64_t i0 = 0; i0 < n; i0 += kSquare) {
      for (int64_t j0 = 0; j0 <= i0; j0 += kSquare) {
        for (int64_t i = i0; i < std::min(i0 + kSquare, n); ++i) {
          for (int64_t j = j0; j < std::min(j0 + kSquare, i + 1); ++j) {
            lower[i * row_stride + j * column_stride] =
                a[i * stack.row_stride + j * stack.column_stride];
          }
        }
      }
    }
    // Elements that lie in a row: row k of the triangle, or its column k.
    auto begin = [&](int64_t k) { return lower + k * n + (by_columns ? k : 0); };
    auto count = [&](int64_t k) { return by_columns ? n - k : k + 1; };
    T largest = 0;
    for (int64_t k = 0; k < n; ++k) {
      const T x = largest_magnitude(begin(k), count(k));
      if (!(x <= largest)) largest = x;
    }
    const double most = double(largest) * scale;
    if (std::isfinite(most)) std::frexp(most, &exponent);  // else the bound will tell
    exponent = std::clamp(exponent, -1000, 1000);
    const double factor = std::ldexp(scale, -exponent);
    for (int64_t k = 0; k < n; ++k) {
      T* x = begin(k);
      for (int64_t i = 0; i < count(k); ++i) x[i] = T(double(x[i]) * factor);
    }
    bound = bound_block(lower, n, row_stride, column_stride, workspace);
  }

  bool has_scale() const { return bound > 0 && std::isfinite(bound); }
};

// root[b] where the block has no root.
template <class T>
RootStatus fall_back(const InverseRoot<T>& problem, const ScaledBlock<T>& scaled, int64_t b) {
  const int64_t n = problem.A.n;
  T* root = problem.root + b * problem.root_block_stride;
  if (problem.previous) {
    const T* previous = problem.previous + b * problem.previous_block_stride;
    const int64_t rows = problem.previous_row_stride, columns = problem.previous_column_stride;
    if (all_finite(previous, n, rows, columns)) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) root[i * n + j] = previous[i * rows + j * columns];
      }
      return RootStatus::kKeptPrevious;
    }
  }
  const T bound = T(std::ldexp(scaled.bound, scaled.exponent));
  const T value = T(std::pow(double(bound), -1 / problem.p));
  const bool usable = bound > 0 && std::isfinite(bound) && std::isfinite(value) && value > 0;
  std::fill(root, root + n * n, T{0});
  for (int64_t i = 0; i < n; ++i) root[i * n + i] = usable ? value : T{1};
  return RootStatus::kFailed;
}

// A root, symmetric, that has neither overflowed nor vanished.
template <class T>
bool is_number(const T* root, int64_t n) {
  bool nonzero = n == 0, finite = true;
  for (int64_t i = 0; i < n; ++i) {
    nonzero |= root[i * n + i] != T{0};
    finite &= std::isfinite(largest_magnitude(root + i * n, i + 1));
  }
  return nonzero && finite;
}

// root[b], residual[b] and status[b] of a block: `root` where it is one, else what is left for it.
template <class T>
void write_root(const InverseRoot<T>& problem, const ScaledBlock<T>& scaled, int64_t b,
                const T* root, bool is_root, double residual) {
  const int64_t n = problem.A.n;
  RootStatus status = RootStatus::kConverged;
  if (is_root) {
    std::copy(root, root + n * n, problem.root + b * problem.root_block_stride);
  } else {
    status = fall_back(problem, scaled, b);
  }
  problem.residual[b] = T(residual);
  problem.status[b] = int8_t(status);
}

}  // namespace shampoo
