// Inverse p-th roots of small matrices: the whole coupled Newton iteration (cpu/inverse_root_newton
// .cpp has the formulas) of a matrix in one thread block, with X, M and H = h(M) in shared memory.
//
//   H <- h(M);   X <- X H;   M <- M H^p     by right-to-left powers: H is squared in its own place,
//
// which takes as many products as left-to-right and no fourth matrix. Every product is written over
// one of its operands, through registers.
//
// Each matrix leaves out the steps that it does not need: where |M - I|_F says that all eigenvalues
// of M lie in the interval that a later step is made for, that step is next.
//
// Proven in emulation: the products at every n (tests/test_emulated_product.py); the roots at n <=
// 48 and, by multiply-adds, 128, and the barriers (tests/test_emulated_root.py). Compiled:
// registers, no spills, the tensor-core instructions. Unproven until run on a GPU: speed, which of
// the two products is faster at which n, and how tensor cores round their sums.
#include <cmath>

#include "cuda/launchers.h"
#include "cuda/product_ffma.h"
#include "cuda/product_mma.h"
#include "cuda/resident_bound.h"
#include "cuda/shared_memory.h"

namespace shampoo {
namespace {

constexpr int kMostN = 128;
constexpr double kResidualLimit = 0.05;

template <class T>
struct Scratch {
  double row_sums[kMostN];
  WarpScratch<double> doubles;
  WarpScratch<T> numbers;
};

// 2^-exponent scale A in M, both triangles, and its bound: NaN or Inf where A is not finite.
template <class T>
struct ScaledMatrix {
  int exponent = 0;
  double bound = 0;

  __device__ ScaledMatrix(const InverseRoot<T>& problem, int64_t b, int leading, T* M,
                          Scratch<T>& scratch) {
    const SymmetricStack<T>& stack = problem.A;
    const T scale = problem.scale != nullptr ? problem.scale[b * problem.scale_stride] : T{1};
    const int n = static_cast<int>(stack.n);
    const T* a = stack.data + b * stack.block_stride;
    T largest = 0;
    for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
      const int i = at / n, j = at % n;
      if (j > i) continue;
      const T x = scale * a[i * stack.row_stride + j * stack.column_stride];
      largest = Max::of(largest, x < 0 ? -x : x);
      M[i * leading + j] = M[j * leading + i] = x;
    }
    largest = block_reduce<Max>(largest, scratch.numbers);
    bound = static_cast<double>(largest);
    if (!(largest > 0 && largest < INFINITY)) return;
    frexp(static_cast<double>(largest), &exponent);
    exponent = exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
    const double factor = ldexp(1.0, -exponent);
    for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
      T& x = M[at / n * leading + at % n];
      x = static_cast<T>(static_cast<double>(x) * factor);
    }
    __syncthreads();
    bound = resident_bound(M, n, leading, scratch.row_sums, scratch.doubles);
  }

  __device__ bool has_scale() const { return bound > 0 && bound < INFINITY; }
};

// (x 2^exponent)^y. Not pow, a call across which registers would be spilled: x is of moderate size,
// so that log2 loses nothing.
__device__ double power(double x, int exponent, double y) {
  return exp2(log2(x) * y) * exp2(exponent * y);
}

// M <- scale M + shift I.
template <class T>
__device__ Distance<T> shift(T* M, int n, int leading, T scale, T shift) {
  Distance<T> distance;
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    const int i = at / n, j = at % n;
    T& x = M[i * leading + j];
    x = scale * x + (i == j ? shift : T{0});
    if (j <= i) distance.add(x - (i == j ? T{1} : T{0}), i == j);
  }
  __syncthreads();
  return distance;
}

// H <- h(M).
template <class T, class Product>
__device__ void polynomial(const Product& product, const T* M, T* H, int n, int leading,
                           const typename RootSteps<T>::Step& h) {
  if (h.c != 0) {
    const T* Q = M;
    for (bool inner = h.s != 0;; inner = false, Q = H) {  // one call: inlined, it takes registers
      product(Q, Q, H, inner ? Epilogue<T>{h.t, h.s, 1, M} : Epilogue<T>{h.a, h.b, h.c, M});
      if (!inner) return;
    }
  }
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    const int i = at / n, j = at % n;
    H[i * leading + j] = h.b * M[i * leading + j] + (i == j ? h.a : T{0});
  }
  __syncthreads();
}

// X <- M^(-1/p). Returns max |M - I| before the last step, infinity where that is not finite.
template <class T, class Product>
__device__ T iterate(const Product& product, T* X, T* M, T* H, int n, int leading,
                     const RootSteps<T>& steps, Distance<T> distance, WarpScratch<T>& scratch) {
  const Epilogue<T> plain{0, 0, 1, nullptr};
  bool first = true;
  for (int step = 0;; ++step) {
    const T largest = block_reduce<Max>(distance.largest, scratch);
    const T away = sqrt(block_reduce<Sum>(distance.squares, scratch));
    if (!(away < INFINITY)) return INFINITY;
    while (step + 1 < steps.count && away <= steps.step[step + 1].reach) ++step;
    polynomial(product, M, H, n, leading, steps.step[step]);
    if (first) {
      for (int at = threadIdx.x; at < n * leading; at += blockDim.x) X[at] = H[at];
      __syncthreads();
      first = false;
    } else {
      product(X, H, X, plain);
    }
    if (step + 1 >= steps.count) return largest;
    for (uint32_t bits = steps.p; bits > 0; bits /= 2) {
      if (bits % 2 == 1) distance = product(M, H, M, plain);
      if (bits > 1) product(H, H, H, plain);
    }
  }
}

// Whether all of (n, n) is finite; every thread gets the answer.
template <class T>
__device__ bool all_finite(const T* a, int n, int64_t row_stride, int64_t column_stride, T factor,
                           WarpScratch<T>& scratch) {
  T largest = 0;
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    const T x = factor * a[at / n * row_stride + at % n * column_stride];
    largest = Max::of(largest, x < 0 ? -x : x);
  }
  return block_reduce<Max>(largest, scratch) < INFINITY;
}

// root[b] and status[b] of a block without a root, as in cpu/inverse_root.h.
template <class T>
__device__ RootStatus fall_back(const InverseRoot<T>& problem, int64_t b,
                                const ScaledMatrix<T>& scaled, WarpScratch<T>& scratch) {
  const int n = static_cast<int>(problem.A.n);
  T* root = problem.root + b * problem.root_block_stride;
  if (problem.previous != nullptr) {
    const T* previous = problem.previous + b * problem.previous_block_stride;
    const int64_t rows = problem.previous_row_stride, columns = problem.previous_column_stride;
    if (all_finite(previous, n, rows, columns, T{1}, scratch)) {
      for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
        root[at] = previous[at / n * rows + at % n * columns];
      }
      return RootStatus::kKeptPrevious;
    }
  }
  const T bound = static_cast<T>(ldexp(scaled.bound, scaled.exponent));
  const T value = static_cast<T>(power(scaled.bound, scaled.exponent, -1 / problem.p));
  const bool usable = bound > 0 && bound < INFINITY && value > 0 && value < INFINITY;
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    root[at] = at / n != at % n ? T{0} : usable ? value : T{1};
  }
  return RootStatus::kFailed;
}

// root[b] <- factor X where that is a root: finite, and not vanished.
template <class T>
__device__ bool write(const InverseRoot<T>& problem, int64_t b, const T* X, int leading, T factor,
                      Scratch<T>& scratch) {
  const int n = static_cast<int>(problem.A.n);
  T diagonal = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    diagonal = Max::of(diagonal, static_cast<T>(fabs(factor * X[i * leading + i])));
  }
  const bool nonzero = block_reduce<Max>(diagonal, scratch.numbers) > 0;
  if (!all_finite(X, n, leading, 1, factor, scratch.numbers) || !nonzero) return false;
  T* root = problem.root + b * problem.root_block_stride;
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    root[at] = factor * X[at / n * leading + at % n];
  }
  return true;
}

template <class T, class Product>
__global__ void __launch_bounds__(Product::kMostThreads, Product::kLeastBlocks)
    inverse_root_kernel(InverseRoot<T> problem, RootSteps<T> steps) {
  __shared__ Scratch<T> scratch;
  const int n = static_cast<int>(problem.A.n), leading = Product::leading(n);
  const int size = Product::rows(n) * leading;
  const int64_t b = blockIdx.x;
  T *X = dynamic_shared<T>(), *M = X + size, *H = M + size;
  for (int at = threadIdx.x; at < 3 * size; at += blockDim.x) X[at] = 0;
  __syncthreads();

  const ScaledMatrix<T> scaled(problem, b, leading, M, scratch);
  T residual = INFINITY;
  bool is_root = false;
  if (scaled.has_scale()) {
    const double scale = (1 + problem.ridge) * scaled.bound;
    const Distance<T> distance = shift(M, n, leading, static_cast<T>(1 / scale),
                                       static_cast<T>(problem.ridge / (1 + problem.ridge)));
    residual = iterate(Product(n), X, M, H, n, leading, steps, distance, scratch.numbers);
    const auto unscale = static_cast<T>(power(scale, scaled.exponent, -1 / problem.p));
    is_root = residual < kResidualLimit && write(problem, b, X, leading, unscale, scratch);
  }
  const RootStatus status =
      is_root ? RootStatus::kConverged : fall_back(problem, b, scaled, scratch.numbers);
  if (threadIdx.x == 0) {
    problem.residual[b] = residual;
    problem.status[b] = static_cast<int8_t>(status);
  }
}

template <class T, class Product>
cudaError_t launch_with(const InverseRoot<T>& problem, const RootSteps<T>& steps, int64_t bytes,
                        cudaStream_t stream) {
  const int threads = Product::threads(static_cast<int>(problem.A.n));
  return launch(inverse_root_kernel<T, Product>, problem.A.blocks, threads, bytes, stream, problem,
                steps);
}

template <class Product>
int64_t bytes_of(int n) {
  return int64_t{3} * sizeof(typename Product::Number) * Product::rows(n) * Product::leading(n);
}

constexpr int kLargestSmallTile = 64;  // where four by four tiles still give a warp or more

}  // namespace

template <class T>
int64_t inverse_root_small_bytes(int64_t n, bool tensor_cores) {
  const int size = static_cast<int>(n);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tensor_cores) return bytes_of<MmaProduct>(size);
    if (n > kLargestSmallTile) return bytes_of<FfmaProduct<T, 8>>(size);
  }
  return bytes_of<FfmaProduct<T, 4>>(size);
}

template <class T>
cudaError_t inverse_root_small_cuda(const InverseRoot<T>& problem, const RootSteps<T>& steps,
                                    bool tensor_cores, cudaStream_t stream) {
  const int64_t n = problem.A.n, bytes = inverse_root_small_bytes<T>(n, tensor_cores);
  const bool fits = bytes + static_cast<int64_t>(sizeof(Scratch<T>)) <= shared_memory_limit();
  if (n < 1 || n > kMostN || !fits) return cudaErrorInvalidValue;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tensor_cores) return launch_with<T, MmaProduct>(problem, steps, bytes, stream);
    if (n > kLargestSmallTile) {
      return launch_with<T, FfmaProduct<T, 8>>(problem, steps, bytes, stream);
    }
  } else if (tensor_cores) {
    return cudaErrorInvalidValue;
  }
  return launch_with<T, FfmaProduct<T, 4>>(problem, steps, bytes, stream);
}

template int64_t inverse_root_small_bytes<float>(int64_t, bool);
template int64_t inverse_root_small_bytes<double>(int64_t, bool);
template cudaError_t inverse_root_small_cuda(const InverseRoot<float>&, const RootSteps<float>&,
                                             bool, cudaStream_t);
template cudaError_t inverse_root_small_cuda(const InverseRoot<double>&, const RootSteps<double>&,
                                             bool, cudaStream_t);

}  // namespace shampoo
