// Inverse p-th roots through LAPACK's divide and conquer eigensolver, one block per thread.
//
// With A = V diag(lambda) V^T and l = lambda + ridge * bound, bound = eigenvalue_bound(A):
//   root = V diag(max(l, u bound)^(-1/p)) V^T = U^T U,  U = diag(max(l, u bound)^(-1/(2p))) V^T,
// u the unit roundoff. U^T U is a symmetric product: half of it is computed and mirrored.
//
// A block has no root if its lower triangle holds NaN or Inf, if bound <= 0, if its smallest
// eigenvalue is below -(max(ridge, rank_rtol) + 16 u) bound, if LAPACK fails, or if the result
// overflows or vanishes.
#include <stdexcept>
#include <utility>

#include "inverse_root.h"
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
    static thread_local Scratch scratch;
    Carve carve(scratch, 2 * Carve::bytes<T>(n * n) + Carve::bytes<T>(n) +
                             Carve::bytes<T>(lapack_size) + Carve::bytes<int>(lapack_int_size) +
                             Carve::bytes<double>(3 * n));
    vectors = carve.take<T>(n * n);
    root = carve.take<T>(n * n);
    values = carve.take<T>(n);
    lapack = carve.take<T>(lapack_size);
    lapack_int = carve.take<int>(lapack_int_size);
    bound = carve.take<double>(3 * n);
  }
};

// work.root <- the root of the scaled block, or false where there is none. LAPACK is given the
// lower triangle: on graded matrices such as Hilbert's the reduction from the upper one is up to
// six times less accurate (float32, n = 33).
template <class T>
bool compute_root(const InverseRoot<T>& problem, double rank_rtol, const ProductPlan<T>& plan,
                  const ScaledBlock<T>& scaled, Workspace<T>& work) {
  const int64_t n = problem.A.n;
  const double bound = scaled.bound, u = std::numeric_limits<T>::epsilon() / 2;
  if (!scaled.has_scale()) return false;
  const int info = syevd('L', int(n), work.vectors, int(n), work.values, work.lapack,
                         work.lapack_size, work.lapack_int, work.lapack_int_size);
  if (info != 0) return false;
  const double allowed = std::max({problem.ridge, rank_rtol, 0.0}) + 16 * u;
  const double smallest = work.values[0], largest = work.values[n - 1];
  if (!(smallest >= -allowed * bound)) return false;

  const double power = -0.5 / problem.p;
  const double unscale = std::exp2(scaled.exponent * power);
  for (int64_t k = 0; k < n; ++k) {
    const double lambda = work.values[k];
    const double l = std::max(lambda + problem.ridge * bound, u * bound);
    const bool dropped = rank_rtol >= 0 && lambda <= rank_rtol * largest;
    const T factor = dropped ? T{0} : T(std::pow(l, power) * unscale);
    for (int64_t i = 0; i < n; ++i) work.vectors[k * n + i] *= factor;  // row k of V^T
  }
  plan.run({work.root, work.root, work.vectors, work.vectors, T{0}, T{1}, T{0}});
  return is_number(work.root, n);
}

}  // namespace

bool has_lapack() {
  return ssyevd_ != nullptr && dsyevd_ != nullptr;
}

template <class T>
void inverse_root_eigh(const InverseRoot<T>& problem, double rank_rtol, const Parallel& parallel) {
  if (!has_lapack()) throw std::runtime_error("inverse_root_eigh: this process has no LAPACK");
  const int64_t n = problem.A.n;
  if (n > 32766) throw std::runtime_error("inverse_root_eigh: n > 32766 overflows LAPACK's sizes");
  // U^T U, with row k of U at vectors + k n.
  constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  const Operand u_transposed = {nullptr, dtype, 0, 0, 1, n};
  const ProductShape symmetric = {n, n, 1, n, true, true, n, n};
  const ProductPlan<T> plan(current_product_isa(), symmetric, u_transposed, u_transposed);
  for_each(parallel, problem.A.blocks, 1, [&](int64_t begin, int64_t end) {
    SingleThreadedMkl single_threaded;
    for (int64_t b = begin; b < end; ++b) {
      Workspace<T> work(n);
      const ScaledBlock<T> scaled(problem, b, work.vectors, true, work.bound);
      const bool is_root = n == 0 || compute_root(problem, rank_rtol, plan, scaled, work);
      const double residual = is_root ? 0 : std::numeric_limits<double>::infinity();
      write_root(problem, scaled, b, work.root, is_root, residual);
    }
  });
}

template void inverse_root_eigh(const InverseRoot<float>&, double, const Parallel&);
template void inverse_root_eigh(const InverseRoot<double>&, double, const Parallel&);

}  // namespace shampoo
