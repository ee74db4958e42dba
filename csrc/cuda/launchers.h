// Every CUDA launcher: as in kernels.h, plain pointers (to device memory), sizes and strides, no
// torch; asynchronous on `stream`. The result is that of the launch, not of the kernel.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace shampoo {

// As eigenvalue_bound of kernels.h. `workspace` holds eigenvalue_bound_workspace(blocks, n)
// doubles.
template <class T>
cudaError_t eigenvalue_bound_cuda(const SymmetricStack<T>& stack, double* workspace, T* bound,
                                  cudaStream_t stream);

int64_t eigenvalue_bound_workspace(int64_t blocks, int64_t n);

// The steps of NewtonSchedule, passed to the kernel by value.
template <class T>
struct RootSteps {
  // A matrix with |M - I|_F <= reach needs no step before this one; that of the first is infinite.
  struct Step {
    T a, b, c, s, t, reach;  // as in NewtonSchedule
  };
  static constexpr int kMost = 48;
  Step step[kMost];
  int count;   // >= 1
  uint32_t p;  // >= 1
};

// Contract, failures and residual of inverse_root_newton, one thread block per matrix. T: float,
// or double without tensor cores. Needs inverse_root_small_bytes() of shared memory, no more than
// shared_memory_limit(), and n <= 128.
template <class T>
cudaError_t inverse_root_small_cuda(const InverseRoot<T>& problem, const RootSteps<T>& steps,
                                    bool tensor_cores, cudaStream_t stream);

template <class T>
int64_t inverse_root_small_bytes(int64_t n, bool tensor_cores);

// As power_iteration of kernels.h, n <= kPowerMostN and min(vectors, n) <= kPowerVectors.
constexpr int kPowerMostN = 1024, kPowerVectors = 16;
template <class T>
cudaError_t power_iteration_cuda(const SymmetricStack<T>& stack, int steps, int64_t vectors,
                                 T* estimate, cudaStream_t stream);

// As orthogonal_iteration of kernels.h, n <= 128. Needs orthogonal_iteration_bytes() of shared
// memory, no more than shared_memory_limit().
template <class T>
cudaError_t orthogonal_iteration_cuda(const OrthogonalIteration<T>& problem, cudaStream_t stream);

template <class T>
int64_t orthogonal_iteration_bytes(int64_t n);

// As pack, pack_finite, unpack_apply and moments of kernels.h; the tables too are in device memory,
// and so is `sums`, room for (chunk_count,).
cudaError_t pack_cuda(const PieceTable& pieces, cudaStream_t stream);

cudaError_t pack_finite_cuda(const PieceTable& pieces, int64_t count, bool negate, double* sums,
                             double* squares, cudaStream_t stream);

template <class F>
cudaError_t unpack_apply_cuda(const PieceTable& pieces, const PieceFactors<F>& factors,
                              cudaStream_t stream);

template <class T>
cudaError_t moments_cuda(const MomentTable& table, const MomentRule& rule, const T* moves,
                         const T* steps, double* sums, double* squares, cudaStream_t stream);

// to[i] <- from[i] for i < count, `from` being host memory, which is free on return; may be
// captured in a CUDA graph, which then holds the numbers.
cudaError_t write_table_cuda(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream);

}  // namespace shampoo
