// Block power iteration, one block per thread, large ones by all: V <- orth(A V), then |A v| / |v|
// for the best v in the span of V. orth and the estimate as in cuda/power_iteration.cu: Cholesky of
// a Gram matrix in double, in which a column that depends on those before becomes zero.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "parallel.h"
#include "product.h"
#include "scratch.h"
#include "wide.h"

namespace shampoo {
namespace {

constexpr double kDependent = 1e-12;  // of a column's squared norm
constexpr int kSquarings = 10;
// Blocks whose largest entry lies within 2^32 of 1 are used where they are: no product leaves the
// range of float32. Others are copied and scaled.
constexpr int kSafeExponent = 32;

// Scratch of one block: V, W as rows of k vectors; L, its spare and y of the k x k problem.
template <class T>
struct Workspace {
  T *V, *W;
  double *gram, *other, *spare, *inverse;

  Workspace(int64_t n, int64_t k) {
    static thread_local Scratch scratch;
    Carve carve(scratch, 2 * Carve::bytes<T>(n * k) + 3 * Carve::bytes<double>(k * k) +
                             Carve::bytes<double>(k));
    V = carve.take<T>(n * k);
    W = carve.take<T>(n * k);
    gram = carve.take<double>(k * k);
    other = carve.take<double>(k * k);
    spare = carve.take<double>(k * k);
    inverse = carve.take<double>(k);
  }
};

// The numbers in (-1/2, 1/2) of ops/power_iteration.py: a hash of the index, in integers.
template <class T>
T start(int64_t index) {
  auto x = uint32_t(index + 1);
  for (int round = 0; round < 2; ++round) x = (x ^ (x >> 16)) * 0x45D9F3Bu;
  return T(x) / T(4294967296.0) - T(0.5);
}

// gram <- V V^T for V (k, n): the vectors are rows.
template <class T>
SHAMPOO_INLINED void gram_of(const T* V, int64_t n, int64_t k, double* gram) {
  constexpr int kLanes = 8;
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c <= r; ++c) {
      double sums[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
          sums[l] += double(V[r * n + i + l]) * double(V[c * n + i + l]);
        }
      }
      for (; i < n; ++i) sums[0] += double(V[r * n + i]) * double(V[c * n + i]);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
      }
      gram[r * k + c] = gram[c * k + r] = sums[0];
    }
  }
}

template <class T>
SHAMPOO_INLINED void orthonormalize_rows(T* V, int64_t n, int64_t k, double* L, double* inverse) {
  gram_of(V, n, k, L);
  for (int64_t j = 0; j < k; ++j) {
    for (int64_t r = j; r < k; ++r) {
      double rest = L[r * k + j];
      for (int64_t c = 0; c < j; ++c) rest -= L[r * k + c] * L[j * k + c];
      if (r == j) inverse[j] = rest > kDependent * L[j * k + j] ? 1 / std::sqrt(rest) : 0;
      if (r > j) L[r * k + j] = rest * inverse[j];
    }
  }
  for (int64_t j = 0; j < k; ++j) {
    T* __restrict row = V + j * n;
    for (int64_t c = 0; c < j; ++c) {
      const T* __restrict other = V + c * n;
      const T factor = T(L[j * k + c]);
      for (int64_t i = 0; i < n; ++i) row[i] -= factor * other[i];
    }
    for (int64_t i = 0; i < n; ++i) row[i] *= T(inverse[j]);
  }
}

SHAMPOO_WIDE void gram(const float* V, int64_t n, int64_t k, double* gram) {
  gram_of(V, n, k, gram);
}
SHAMPOO_WIDE void gram(const double* V, int64_t n, int64_t k, double* gram) {
  gram_of(V, n, k, gram);
}
SHAMPOO_WIDE void orthonormalize(float* V, int64_t n, int64_t k, double* L, double* inverse) {
  orthonormalize_rows(V, n, k, L, inverse);
}
SHAMPOO_WIDE void orthonormalize(double* V, int64_t n, int64_t k, double* L, double* inverse) {
  orthonormalize_rows(V, n, k, L, inverse);
}

double quadratic(const double* gram, const double* y, int64_t k) {
  double sum = 0;
  for (int64_t r = 0; r < k; ++r) {
    for (int64_t c = 0; c < k; ++c) sum += y[r] * gram[r * k + c] * y[c];
  }
  return sum;
}

// y <- near the first eigenvector of gram: the largest column of gram^1024. False for zero.
SHAMPOO_WIDE bool leading_vector(const double* gram, int64_t k, double* __restrict power,
                                 double* __restrict spare, double* y) {
  std::copy(gram, gram + k * k, power);
  for (int squaring = 0; squaring < kSquarings; ++squaring) {
    double trace = 0;
    for (int64_t r = 0; r < k; ++r) trace += power[r * k + r];
    if (!(trace > 0)) return false;
    for (int64_t i = 0; i < k * k; ++i) power[i] /= trace;
    for (int64_t r = 0; r < k; ++r) {
      std::fill(spare + r * k, spare + (r + 1) * k, 0.0);
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t c = 0; c < k; ++c) spare[r * k + c] += power[r * k + j] * power[j * k + c];
      }
    }
    std::copy(spare, spare + k * k, power);
  }
  int64_t best = 0;
  for (int64_t r = 1; r < k; ++r) {
    if (power[r * k + r] > power[best * k + best]) best = r;
  }
  for (int64_t r = 0; r < k; ++r) y[r] = power[r * k + best];
  return true;
}

// max |a_ij|, NaN above all: the bits of numbers without their sign are in the same order.
template <class T>
double largest_of(const SymmetricStack<T>& block, const Parallel& parallel) {
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const int64_t n = block.n, rows_each = std::max<int64_t>(1, (1 << 16) / n);
  const int64_t outer = std::max(block.row_stride, block.column_stride);
  const int64_t inner = std::min(block.row_stride, block.column_stride);
  std::atomic<Bits> largest{0};
  for_each(parallel, n, rows_each, [&](int64_t begin, int64_t end) {
    Bits most = 0;
    auto scan = [&](const T* row, int64_t stride) {
      for (int64_t j = 0; j < n; ++j) {
        most =
            std::max(most, std::bit_cast<Bits>(row[j * stride]) & std::numeric_limits<Bits>::max());
      }
    };
    for (int64_t i = begin; i < end; ++i) {
      const T* row = block.data + i * outer;
      inner == 1 ? scan(row, 1) : scan(row, inner);
    }
    Bits before = largest.load();
    while (before < most && !largest.compare_exchange_weak(before, most)) {
    }
  });
  return double(std::bit_cast<T>(largest.load()));
}

// The block times 2^-exponent.
template <class T>
SymmetricStack<T> scaled_copy(const SymmetricStack<T>& block, int exponent) {
  static thread_local Scratch scratch;
  const int64_t n = block.n;
  T* copy = static_cast<T*>(scratch.reserve(n * n * sizeof(T)));
  const double factor = std::ldexp(1.0, -std::clamp(exponent, -1000, 1000));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      copy[i * n + j] =
          T(double(block.data[i * block.row_stride + j * block.column_stride]) * factor);
    }
  }
  return {copy, 1, n, 0, n, 1};
}

template <class T>
ProductPlan<T> plan_of(const SymmetricStack<T>& block, int64_t k) {
  constexpr DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  const Operand vectors = {nullptr, dtype, 0, 0, block.n, 1};
  const Operand columns = {nullptr, dtype, 0, 0, block.column_stride, block.row_stride};
  const ProductShape shape = {k, block.n, 1, block.n, false, false, block.n, block.n};
  return ProductPlan<T>(current_product_isa(), shape, vectors, columns);
}

// By the caller's threads; with one, on the calling thread.
template <class T>
double estimate_of(SymmetricStack<T> block, int64_t steps, int64_t k, const Parallel& parallel) {
  const int64_t n = block.n;
  const double largest = largest_of(block, parallel);
  if (largest == 0) return 0;
  if (!std::isfinite(largest)) return std::numeric_limits<double>::quiet_NaN();
  int exponent = 0;
  std::frexp(largest, &exponent);
  if (std::abs(exponent) > kSafeExponent) {
    block = scaled_copy(block, exponent);
  } else {
    exponent = 0;
  }
  Workspace<T> work(n, k);
  const ProductPlan<T> plan = plan_of(block, k);
  for (int64_t c = 0; c < k; ++c) {
    for (int64_t i = 0; i < n; ++i) work.V[c * n + i] = start<T>(i * k + c);
  }
  auto orthonormal = [&] { orthonormalize(work.V, n, k, work.gram, work.inverse); };
  auto multiply = [&] {  // V <- V A, whose rows are A v
    const ProductBlock<T> product = {work.W, work.W, work.V, block.data, T{0}, T{1}, T{0}};
    parallel.workers > 1 ? plan.run_parallel(product, parallel) : plan.run(product);
    std::swap(work.V, work.W);
  };
  orthonormal();
  for (int64_t step = 0; step < steps; ++step) {
    multiply();
    orthonormal();
  }
  orthonormal();
  const T* before = work.V;
  multiply();
  gram(work.V, n, k, work.gram);
  if (!leading_vector(work.gram, k, work.other, work.spare, work.inverse)) return 0;
  gram(before, n, k, work.other);
  const double denominator = quadratic(work.other, work.inverse, k);
  const double numerator = quadratic(work.gram, work.inverse, k);
  return denominator > 0 ? std::ldexp(std::sqrt(numerator / denominator), exponent) : 0;
}

}  // namespace

template <class T>
void power_iteration(const SymmetricStack<T>& stack, int64_t steps, int64_t vectors, T* estimate,
                     const Parallel& parallel) {
  const int64_t k = std::min(vectors, stack.n);
  auto estimate_block = [&](int64_t b, const Parallel& threads) {
    const T* data = stack.data + b * stack.block_stride;
    const SymmetricStack<T> block = {data, 1, stack.n, 0, stack.row_stride, stack.column_stride};
    estimate[b] = T(estimate_of(block, steps, k, threads));
  };
  const int64_t whole = plan_of(stack, k).whole_blocks(stack.blocks, parallel);
  for_each(parallel, whole, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) estimate_block(b, Parallel{});
  });
  for (int64_t b = whole; b < stack.blocks; ++b) estimate_block(b, parallel);
}

template void power_iteration(const SymmetricStack<float>&, int64_t, int64_t, float*,
                              const Parallel&);
template void power_iteration(const SymmetricStack<double>&, int64_t, int64_t, double*,
                              const Parallel&);

}  // namespace shampoo
