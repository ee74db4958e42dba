// Dynamic shared memory: how a kernel names it, and how a launch asks for it; registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace shampoo {

#if !defined(SHAMPOO_EMULATED)
extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
#endif

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(SHAMPOO_EMULATED)
  return reinterpret_cast<T*>(emulate::current->dynamic_shared.get());
#else
  return reinterpret_cast<T*>(dynamic_shared_bytes);
#endif
}

// x, of which the compiler knows nothing: it cannot compute ahead what depends on it.
__device__ __forceinline__ int opaque(int x) {
#if !defined(SHAMPOO_EMULATED)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Launches one thread block per task with `bytes` of dynamic shared memory.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t tasks, int threads, int64_t bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (tasks == 0) return cudaSuccess;
  if (tasks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int64_t kWithoutAsking = 48 * 1024;
  if (bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tasks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Bytes of shared memory that a thread block may have on the current device.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? bytes : 0;
}

}  // namespace shampoo
