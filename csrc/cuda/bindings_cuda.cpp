// The CUDA kernels as torch ops; the schemas are those of bindings.cpp.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/launchers.h"

// A CPU build of torch declares this and lacks it; the module imports there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& on) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  const int32_t device = on.get_device_index();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "no current CUDA stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

template <class T>
void launch_eigenvalue_bound(const Tensor& A, const Tensor& workspace, Tensor& bound) {
  const shampoo::SymmetricStack<T> stack{static_cast<const T*>(A.const_data_ptr()),
                                         A.size(0),
                                         A.size(1),
                                         A.stride(0),
                                         A.stride(1),
                                         A.stride(2)};
  const cudaError_t error = shampoo::eigenvalue_bound_cuda<T>(
      stack, static_cast<double*>(workspace.mutable_data_ptr()),
      static_cast<T*>(bound.mutable_data_ptr()), current_stream(A));
  STD_TORCH_CHECK(error == cudaSuccess, "eigenvalue_bound: ", cudaGetErrorString(error));
}

Tensor eigenvalue_bound(Tensor A) {
  STD_TORCH_CHECK(A.dim() == 3 && A.size(1) == A.size(2), "eigenvalue_bound: A must be (B, n, n)");
  const bool single = A.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || A.scalar_type() == ScalarType::Double,
                  "eigenvalue_bound: A must be float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(A.get_device_index());
  Tensor bound = torch::stable::new_empty(A, {A.size(0)});
  const Tensor workspace = torch::stable::new_empty(
      A, {shampoo::eigenvalue_bound_workspace(A.size(0), A.size(1))}, ScalarType::Double);
  single ? launch_eigenvalue_bound<float>(A, workspace, bound)
         : launch_eigenvalue_bound<double>(A, workspace, bound);
  return bound;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CUDA, library) {
  library.impl("eigenvalue_bound", TORCH_BOX(&eigenvalue_bound));
}
