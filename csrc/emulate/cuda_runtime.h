// Enough of CUDA to run csrc/cuda/*.cu as plain C++20 on threads: with -Icsrc/emulate this header
// is found in place of the toolkit's. One std::thread per CUDA thread, a barrier per warp and one
// per thread block, thread blocks in turn, dynamic shared memory as a heap buffer of exactly the
// size asked for, full of NaN: slow, for n of some dozens, and open to sanitizers.
//
// What it cannot show: the weak memory order of a GPU beyond what a missing barrier is, warps that
// run divergent code, and the tensor cores' own arithmetic (emulate/mma.h rounds to nearest).
#pragma once

#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define SHAMPOO_EMULATED

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static  // thread blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulate {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kSharedMemory = 227 * 1024;  // of a thread block, on sm_90 and sm_100
constexpr size_t kSlot = 64;                  // bytes that a lane can show to its warp at once

struct Warp {
  std::barrier<> barrier{kWarpSize};
  alignas(16) unsigned char exchange[kWarpSize][kSlot];
};

struct ThreadBlock {
  std::barrier<> barrier;
  std::unique_ptr<Warp[]> warps;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  size_t dynamic_bytes;

  ThreadBlock(unsigned threads, size_t bytes)
      : barrier(threads),
        warps(std::make_unique<Warp[]>(threads / kWarpSize)),
        dynamic_shared(std::make_unique<unsigned char[]>(bytes)),
        dynamic_bytes(bytes) {}
};

inline ThreadBlock* current = nullptr;

inline Warp& warp() {
  return current->warps[threadIdx.x / kWarpSize];
}

inline bool can_launch(const dim3& grid, const dim3& block, size_t shared) {
  const bool flat = grid.y * grid.z * block.y * block.z == 1;
  return flat && grid.x > 0 && block.x > 0 && block.x % kWarpSize == 0 && block.x <= kMostThreads &&
         shared <= kSharedMemory;
}

}  // namespace emulate

inline void __syncthreads() {
  emulate::current->barrier.arrive_and_wait();
}

inline void __syncwarp(unsigned = ~0u) {
  emulate::warp().barrier.arrive_and_wait();
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static_assert(sizeof(T) <= emulate::kSlot);
  auto& exchange = emulate::warp().exchange;
  const int lane = threadIdx.x % emulate::kWarpSize;
  std::memcpy(exchange[lane], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, exchange[lane ^ lanes], sizeof(T));
  __syncwarp();
  return value;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = int(emulate::kSharedMemory);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return size_t(bytes) <= emulate::kSharedMemory ? cudaSuccess : cudaErrorInvalidValue;
}

// One-dimensional grids of whole warps. Returns when the kernel is done.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (!emulate::can_launch(grid, block, config->dynamicSmemBytes)) {
    return cudaErrorInvalidConfiguration;
  }
  emulate::ThreadBlock state(block.x, config->dynamicSmemBytes);
  emulate::current = &state;
  gridDim = grid;
  blockDim = block;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block.x; ++thread) {
    threads.emplace_back([=, &state] {
      threadIdx = dim3(thread, 0, 0);
      for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = dim3(b, 0, 0);
        if (thread == 0) std::memset(state.dynamic_shared.get(), 0xff, state.dynamic_bytes);
        __syncthreads();
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  emulate::current = nullptr;
  return cudaSuccess;
}
