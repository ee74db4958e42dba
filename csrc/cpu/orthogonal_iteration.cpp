// Orthogonal iteration, one block per thread: Z <- A Q + lift max |q^T A q| Q, then LAPACK's QR of
// Z / max |z| with the signs of diag(R).
//
// A Q is computed as A^T Q would be, from rows of A^T and of Q^T as they lie in column-major Q and
// Z: Z^T = Q^T A, one (n, n, n) product of the packed tiles.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "lapack.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"

namespace shampoo {
namespace {

// Scratch of one block; matrices are column-major, which is to say that their rows are columns.
template <class T>
struct Workspace {
  T *A, *Q, *Z, *tau, *sign, *lapack;
  int lapack_size;

  explicit Workspace(int64_t n) {
    constexpr int kBlock = 64;  // columns that LAPACK works on at a time
    lapack_size = int(n) * kBlock;
    static thread_local Scratch scratch;
    Carve carve(scratch,
                3 * Carve::bytes<T>(n * n) + 2 * Carve::bytes<T>(n) + Carve::bytes<T>(lapack_size));
    A = carve.take<T>(n * n);
    Q = carve.take<T>(n * n);
    Z = carve.take<T>(n * n);
    tau = carve.take<T>(n);
    sign = carve.take<T>(n);
    lapack = carve.take<T>(lapack_size);
  }
};

template <class T>
T dot(const T* x, const T* y, int64_t n) {
  T sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += x[i + l] * y[i + l];
  }
  for (; i < n; ++i) sums[0] += x[i] * y[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// max |x|, NaN above all.
template <class T>
T largest(const T* x, int64_t count) {
  T found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T size = std::abs(x[i]);
    found = size > found || size != size ? size : found;
    if (found != found) break;
  }
  return found;
}

// Q <- orth(Z + lift max |q_k^T z_k| Q), or Q where that is zero or not finite; Z is used up.
template <class T>
void step(const Workspace<T>& work, int64_t n, T lift) {
  T estimate = 0;
  for (int64_t k = 0; k < n; ++k) {
    const T size = std::abs(dot(work.Q + k * n, work.Z + k * n, n));
    estimate = size > estimate || size != size ? size : estimate;
  }
  for (int64_t i = 0; i < n * n; ++i) work.Z[i] += lift * estimate * work.Q[i];
  const T size = largest(work.Z, n * n);
  if (!(size > 0 && size <= std::numeric_limits<T>::max())) return;
  for (int64_t i = 0; i < n * n; ++i) work.Z[i] /= size;
  if (qr(int(n), work.Z, work.tau, work.sign, work.lapack, work.lapack_size) != 0) return;
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = 0; i < n; ++i) work.Q[k * n + i] = work.sign[k] * work.Z[k * n + i];
  }
}

template <class T>
void iterate(const OrthogonalIteration<T>& problem, int64_t b, const ProductPlan<T>& plan) {
  const int64_t n = problem.n;
  Workspace<T> work(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      work.A[i * n + j] = problem.A.at(b, i, j);
      work.Q[j * n + i] = problem.Q.at(b, i, j);
    }
  }
  auto multiply = [&] { plan.run({work.Z, work.Z, work.Q, work.A, T{0}, T{1}, T{0}}); };
  multiply();
  for (int64_t i = 0; i < problem.steps; ++i) {
    step(work, n, T(problem.lift));
    multiply();
  }
  T* eigenvalues = problem.eigenvalues + b * n;
  for (int64_t k = 0; k < n; ++k) eigenvalues[k] = dot(work.Q + k * n, work.Z + k * n, n);
  const bool finite =
      std::isfinite(largest(work.Z, n * n)) && std::isfinite(largest(eigenvalues, n));
  if (!finite) std::fill(eigenvalues, eigenvalues + n, std::numeric_limits<T>::quiet_NaN());
  T* basis = problem.basis + b * n * n;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < n; ++k) basis[i * n + k] = work.Q[k * n + i];
  }
}

}  // namespace

bool has_qr() {
  return sgeqrf_ != nullptr && dgeqrf_ != nullptr && sorgqr_ != nullptr && dorgqr_ != nullptr;
}

template <class T>
void orthogonal_iteration(const OrthogonalIteration<T>& problem, const Parallel& parallel) {
  if (!has_qr()) throw std::runtime_error("orthogonal_iteration: this process has no LAPACK");
  const int64_t n = problem.n;
  // Z[k, i] = sum_j Q[k, j] A[i, j]
  constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  const Operand rows = {nullptr, dtype, 0, 0, n, 1};
  const ProductShape full = {n, n, 1, n, false, false, n, n};
  const ProductPlan<T> plan(current_product_isa(), full, rows, rows);
  for_each(parallel, problem.blocks, 1, [&](int64_t begin, int64_t end) {
    SingleThreadedMkl single_threaded;
    for (int64_t b = begin; b < end; ++b) iterate(problem, b, plan);
  });
}

template void orthogonal_iteration(const OrthogonalIteration<float>&, const Parallel&);
template void orthogonal_iteration(const OrthogonalIteration<double>&, const Parallel&);

}  // namespace shampoo
