// Inverse p-th roots through LAPACK's divide and conquer eigensolver, one block per thread.
//
// With A = V diag(lambda) V^T and l = lambda + ridge * bound, bound = eigenvalue_bound(A):
//   root = V diag(max(l, u bound)^(-1/p)) V^T = U^T U,  U = diag(max(l, u bound)^(-1/(2p))) V^T,
// u the unit roundoff. U^T U is a Gram product: half of it is computed and it is exactly symmetric.
// The block is scaled by a power of two to max |a_ij| in [1/2, 1) first, so that squares neither
// overflow nor vanish.
//
// A block has no root if its lower triangle holds NaN or Inf, if bound <= 0, if its smallest
// eigenvalue is below -(max(ridge, rank_rtol) + 16 u) bound, if LAPACK fails, or if the result is
// not finite. Such a block gets
//   previous[b]            where there is one and it is finite: KEPT_PREVIOUS,
//   bound^(-1/p) I         where that is finite and positive: FAILED,
//   I                      else: FAILED.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>

#include "../kernels.h"
#include "eigenvalue_bound.h"
#include "lapack.h"
#include "product.h"
#include "scratch.h"

namespace shampoo {
namespace {

// Scratch of one block; `vectors` and `root` are n x n.
template <class T>
struct Workspace {
  T *vectors, *root, *values, *lapack;
  int* lapack_int;
  double* bound;
  int lapack_size, lapack_int_size;

  explicit Workspace(int64_t n) {
    // LAPACK's documented least, and what MKL 2024.2 asks for at every n.
    lapack_size = int(1 + 6 * n + 2 * n * n);
    lapack_int_size = int(3 + 5 * n);
    const int64_t square = bytes<T>(n * n);
    static thread_local Scratch scratch;
    char* at =
        static_cast<char*>(scratch.reserve(2 * square + bytes<T>(n) + bytes<T>(lapack_size) +
                                           bytes<int>(lapack_int_size) + bytes<double>(3 * n)));
    auto take = [&at](int64_t size) { return std::exchange(at, at + size); };
    vectors = reinterpret_cast<T*>(take(square));
    root = reinterpret_cast<T*>(take(square));
    values = reinterpret_cast<T*>(take(bytes<T>(n)));
    lapack = reinterpret_cast<T*>(take(bytes<T>(lapack_size)));
    lapack_int = reinterpret_cast<int*>(take(bytes<int>(lapack_int_size)));
    bound = reinterpret_cast<double*>(take(bytes<double>(3 * n)));
  }

  template <class U>
  static int64_t bytes(int64_t count) {
    return round_up(count * int64_t{sizeof(U)}, Scratch::kAlignment);
  }
};

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

// What stands for the block in LAPACK: the lower triangle of 2^-exponent A, column-major, and its
// bound (NaN or Inf where A is not finite). The lower one: on graded matrices such as Hilbert's the
// reduction from the upper triangle is up to six times less accurate (float32, n = 33).
template <class T>
struct Scaled {
  int exponent = 0;
  double bound = 0;

  Scaled(const T* a, const SymmetricStack<T>& stack, Workspace<T>& work) {
    const int64_t n = stack.n;
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const T x = a[i * stack.row_stride + j * stack.column_stride];
        work.vectors[j * n + i] = x;
        // A NaN passes by: the bound will report it.
        largest = std::max(largest, std::abs(double(x)));
      }
    }
    if (std::isfinite(largest)) std::frexp(largest, &exponent);
    exponent = std::clamp(exponent, -1000, 1000);
    const double factor = std::ldexp(1.0, -exponent);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = j; i < n; ++i) {
        work.vectors[j * n + i] = T(double(work.vectors[j * n + i]) * factor);
      }
    }
    bound = bound_block(work.vectors, n, int64_t{1}, n, work.bound);
  }
};

// work.root <- the root of the scaled block, or false where there is none.
template <class T>
bool compute_root(const InverseRootEigh<T>& problem, const ProductPlan<T>& plan,
                  const Scaled<T>& scaled, Workspace<T>& work) {
  const int64_t n = problem.A.n;
  const double bound = scaled.bound, u = std::numeric_limits<T>::epsilon() / 2;
  if (!(bound > 0 && std::isfinite(bound))) return false;
  const int info = syevd('L', int(n), work.vectors, int(n), work.values, work.lapack,
                         work.lapack_size, work.lapack_int, work.lapack_int_size);
  if (info != 0) return false;
  const double allowed = std::max({problem.ridge, problem.rank_rtol, 0.0}) + 16 * u;
  const double smallest = work.values[0], largest = work.values[n - 1];
  if (!(smallest >= -allowed * bound)) return false;

  const double power = -0.5 / problem.p;
  const double unscale = std::exp2(scaled.exponent * power);
  for (int64_t k = 0; k < n; ++k) {
    const double lambda = work.values[k];
    const double l = std::max(lambda + problem.ridge * bound, u * bound);
    const bool dropped = problem.rank_rtol >= 0 && lambda <= problem.rank_rtol * largest;
    const T factor = dropped ? T{0} : T(std::pow(l, power) * unscale);
    for (int64_t i = 0; i < n; ++i) work.vectors[k * n + i] *= factor;  // row k of V^T
  }
  plan.run({work.root, work.root, work.vectors, work.vectors, T{0}, T{1}, T{0}});
  return all_finite(work.root, n, n, int64_t{1});
}

// root[b] for a block without a root.
template <class T>
RootStatus fall_back(const InverseRootEigh<T>& problem, const Scaled<T>& scaled, int64_t b) {
  const int64_t n = problem.A.n;
  T* root = problem.root + b * n * n;
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

}  // namespace

bool has_lapack() {
  return ssyevd_ != nullptr && dsyevd_ != nullptr;
}

template <class T>
void inverse_root_eigh(const InverseRootEigh<T>& problem, const Parallel& parallel) {
  if (!has_lapack()) throw std::runtime_error("inverse_root_eigh: this process has no LAPACK");
  const int64_t n = problem.A.n;
  if (n > 32766) throw std::runtime_error("inverse_root_eigh: n > 32766 overflows LAPACK's sizes");
  // U^T U, with row k of U at vectors + k n.
  constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  const Operand u_transposed = {nullptr, dtype, 0, 0, 1, n};
  const ProductShape symmetric = {n, n, 1, n, true, n, n};
  const ProductPlan<T> plan(current_product_isa(), symmetric, u_transposed, u_transposed);
  for_each(parallel, problem.A.blocks, 1, [&](int64_t begin, int64_t end) {
    SingleThreadedMkl single_threaded;
    for (int64_t b = begin; b < end; ++b) {
      Workspace<T> work(n);
      const Scaled<T> scaled(problem.A.data + b * problem.A.block_stride, problem.A, work);
      RootStatus status = RootStatus::kConverged;
      if (n > 0 && !compute_root(problem, plan, scaled, work)) {
        status = fall_back(problem, scaled, b);
      } else {
        std::copy(work.root, work.root + n * n, problem.root + b * n * n);
      }
      const bool has_root = status == RootStatus::kConverged;
      problem.residual[b] = has_root ? T{0} : std::numeric_limits<T>::infinity();
      problem.status[b] = int8_t(status);
    }
  });
}

template void inverse_root_eigh(const InverseRootEigh<float>&, const Parallel&);
template void inverse_root_eigh(const InverseRootEigh<double>&, const Parallel&);

}  // namespace shampoo
