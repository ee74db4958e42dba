// Orthogonal iteration of small matrices: a thread block per matrix, with A, Q and Z in shared
// memory, all steps in one launch.
//
//   Z <- A Q + lift max_k |q_k^T A q_k| Q;   Q R = Z / max |z|, diag(R) >= 0;   Q.
//
// Householder QR, a thread per column: step j is applied by every later column to itself, and the
// next reflector is made by its column in the same step, so that a step costs one barrier. Q is
// formed without any: column k of H_1 ... H_n is a thread's own. Columns that depend on others are
// completed to a basis, as by LAPACK.
//
// Proven in emulation: the numbers, at n <= 48, and the barriers (tests/test_emulated_basis.py).
// Unproven until run on a GPU: speed.
#include <cmath>

#include "cuda/block_reduce.h"
#include "cuda/launchers.h"
#include "cuda/product_ffma.h"
#include "cuda/shared_memory.h"

namespace shampoo {
namespace {

constexpr int kMostN = 128;
constexpr int kTile = 4;

template <class T>
struct Scratch {
  T tau[kMostN];
  T sign[kMostN];
  WarpScratch<T> numbers;
};

__host__ __device__ int leading(int n) {
  return (n + kTile - 1) / kTile * kTile;
}

// Z <- A^T Q for symmetric A, (n, n) in shared memory with rows of leading(n) numbers. Threads take
// 4 x 4 tiles; at most the padding of A and Q is read beyond n, and none of Z written.
template <class T>
__device__ void multiply(const T* A, const T* Q, T* Z, int n) {
  const int width = leading(n), tiles = width / kTile;
  for (int at = threadIdx.x; at < tiles * tiles; at += blockDim.x) {
    const int i = at / tiles * kTile, k = at % tiles * kTile;
    T sums[kTile][kTile] = {};
    for (int j = 0; j < n; ++j) {
      const auto a = *reinterpret_cast<const Four<T>*>(A + j * width + i);
      const auto q = *reinterpret_cast<const Four<T>*>(Q + j * width + k);
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) sums[r][c] += a.v[r] * q.v[c];
      }
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) {
        if (i + r < n && k + c < n) Z[(i + r) * width + k + c] = sums[r][c];
      }
    }
  }
  __syncthreads();
}

// q_k^T z_k of this thread's column.
template <class T>
__device__ T column_product(const T* Q, const T* Z, int n) {
  const int k = threadIdx.x, width = leading(n);
  T sum = 0;
  if (k < n) {
    for (int i = 0; i < n; ++i) sum += Q[i * width + k] * Z[i * width + k];
  }
  return sum;
}

// The reflector of column j, in place of what it takes out: I - tau v v^T with v_j = 1.
template <class T>
__device__ void make_reflector(T* Z, int j, int n, Scratch<T>& scratch) {
  const int width = leading(n);
  T rest = 0;
  for (int i = j + 1; i < n; ++i) rest += Z[i * width + j] * Z[i * width + j];
  const T first = Z[j * width + j];
  if (rest == 0) {
    scratch.tau[j] = 0;
    scratch.sign[j] = first < 0 ? -1 : 1;
    return;
  }
  const T norm = sqrt(first * first + rest), beta = first < 0 ? norm : -norm;
  scratch.tau[j] = (beta - first) / beta;
  scratch.sign[j] = beta < 0 ? -1 : 1;
  const T divisor = first - beta;
  for (int i = j + 1; i < n; ++i) Z[i * width + j] /= divisor;
}

// Column k of C <- (I - tau v v^T) of reflector j, which lies in Z, times it.
template <class T>
__device__ void reflect(const T* Z, int j, T* C, int k, int n, const Scratch<T>& scratch) {
  const int width = leading(n);
  T sum = C[j * width + k];
#pragma unroll 4
  for (int i = j + 1; i < n; ++i) sum += Z[i * width + j] * C[i * width + k];
  sum *= scratch.tau[j];
  C[j * width + k] -= sum;
#pragma unroll 4
  for (int i = j + 1; i < n; ++i) C[i * width + k] -= sum * Z[i * width + j];
}

// Q <- the Q factor of Z with diag(R) >= 0. Z is used up.
template <class T>
__device__ void qr(T* Z, T* Q, int n, Scratch<T>& scratch) {
  const int k = threadIdx.x, width = leading(n);
  if (k == 0) make_reflector(Z, 0, n, scratch);
  __syncthreads();
  for (int j = 0; j + 1 < n; ++j) {
    if (k > j && k < n) {
      reflect(Z, j, Z, k, n, scratch);
      if (k == j + 1) make_reflector(Z, k, n, scratch);
    }
    __syncthreads();
  }
  if (k < n) {
    for (int i = 0; i < n; ++i) Q[i * width + k] = i == k ? scratch.sign[k] : T{0};
    for (int j = k; j >= 0; --j) reflect(Z, j, Q, k, n, scratch);
  }
  __syncthreads();
}

template <class T>
__device__ T largest_number(const T* Z, int n, WarpScratch<T>& scratch) {
  const int width = leading(n);
  T largest = 0;
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    const T z = Z[at / n * width + at % n];
    largest = Max::of(largest, z < 0 ? -z : z);
  }
  return block_reduce<Max>(largest, scratch);
}

// Q <- orth(Z + lift max_k |q_k^T z_k| Q), or Q where that is zero or not finite.
template <class T>
__device__ void step(T* Q, T* Z, int n, T lift, Scratch<T>& scratch) {
  const int width = leading(n);
  const T product = column_product(Q, Z, n);
  const T largest = block_reduce<Max>(product < 0 ? -product : product, scratch.numbers);
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    const int here = at / n * width + at % n;
    Z[here] += lift * largest * Q[here];
  }
  __syncthreads();
  const T size = largest_number(Z, n, scratch.numbers);
  if (!(size > 0 && size < INFINITY)) return;
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) Z[at / n * width + at % n] /= size;
  __syncthreads();
  qr(Z, Q, n, scratch);
}

template <class T>
__global__ void __launch_bounds__(kMostN)
    orthogonal_iteration_kernel(OrthogonalIteration<T> problem) {
  __shared__ Scratch<T> scratch;
  const int n = static_cast<int>(problem.n), width = leading(n);
  const int64_t b = blockIdx.x;
  T *A = dynamic_shared<T>(), *Q = A + n * width, *Z = Q + n * width;
  for (int at = threadIdx.x; at < n * width; at += blockDim.x) {
    const int64_t i = at / width, j = at % width;
    A[at] = j < n ? problem.A.at(b, i, j) : T{0};
    Q[at] = j < n ? problem.Q.at(b, i, j) : T{0};
  }
  __syncthreads();
  multiply(A, Q, Z, n);
  for (int i = 0; i < problem.steps; ++i) {
    step(Q, Z, n, static_cast<T>(problem.lift), scratch);
    multiply(A, Q, Z, n);
  }
  const T eigenvalue = column_product(Q, Z, n);
  const T size = block_reduce<Max>(eigenvalue < 0 ? -eigenvalue : eigenvalue, scratch.numbers);
  const bool finite = largest_number(Z, n, scratch.numbers) < INFINITY && size < INFINITY;
  const int k = threadIdx.x;
  if (k < n) problem.eigenvalues[b * n + k] = finite ? eigenvalue : static_cast<T>(NAN);
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    problem.basis[b * n * n + at] = Q[at / n * width + at % n];
  }
}

}  // namespace

template <class T>
int64_t orthogonal_iteration_bytes(int64_t n) {
  return 3 * n * leading(static_cast<int>(n)) * static_cast<int64_t>(sizeof(T));
}

template <class T>
cudaError_t orthogonal_iteration_cuda(const OrthogonalIteration<T>& problem, cudaStream_t stream) {
  const int64_t n = problem.n, bytes = orthogonal_iteration_bytes<T>(n);
  const bool fits = bytes + static_cast<int64_t>(sizeof(Scratch<T>)) <= shared_memory_limit();
  if (n < 1 || n > kMostN || !fits) return cudaErrorInvalidValue;
  const int threads = static_cast<int>((n + kWarpSize - 1) / kWarpSize * kWarpSize);
  return launch(orthogonal_iteration_kernel<T>, problem.blocks, threads, bytes, stream, problem);
}

template int64_t orthogonal_iteration_bytes<float>(int64_t);
template int64_t orthogonal_iteration_bytes<double>(int64_t);
template cudaError_t orthogonal_iteration_cuda(const OrthogonalIteration<float>&, cudaStream_t);
template cudaError_t orthogonal_iteration_cuda(const OrthogonalIteration<double>&, cudaStream_t);

}  // namespace shampoo
