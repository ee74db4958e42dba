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

}  // namespace shampoo
