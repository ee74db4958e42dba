// The current stream of torch, and how a launch's error is told.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings.h"
#include "cuda/launchers.h"

// A CPU build of torch declares this and lacks it; the module imports there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace shampoo {

// Makes the device of a tensor current, and holds its stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& on) : guard(on.get_device_index()), stream(current(on)) {}

 private:
  static cudaStream_t current(const Tensor& on) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    void* stream = nullptr;
    const int32_t device = on.get_device_index();
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                    "no current CUDA stream on device ", device);
    return static_cast<cudaStream_t>(stream);
  }
};

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& A,
                       ScalarType dtype, std::initializer_list<int64_t> shape, bool contiguous) {
  STD_TORCH_CHECK(!t.is_cpu() && t.get_device_index() == A.get_device_index(), op, ": ", name,
                  " must be on the device of A");
  check_same_dtype(op, name, t, dtype);
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), op, ": ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) check_size(op, name, t, dim++, size);
  STD_TORCH_CHECK(!contiguous || t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_square_floats(const char* op, const Tensor& A) {
  STD_TORCH_CHECK(A.dim() == 3 && A.size(1) == A.size(2), op, ": A must be (B, n, n)");
  const ScalarType dtype = A.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": A must be float32 or float64");
}

// f(T{}) for the dtype of A.
template <class F>
void by_dtype(const Tensor& A, const F& f) {
  A.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

}  // namespace shampoo
