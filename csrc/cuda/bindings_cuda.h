// The current stream of torch, and how a launch's error is told.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings_matrices.h"
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

}  // namespace shampoo
