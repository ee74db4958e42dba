// Enough of CUDA to run csrc/cuda/*.cu as plain C++20 on threads: with -Icsrc/emulate this header
// is found in place of the toolkit's. One std::thread per CUDA thread, a barrier per warp and one
// per thread block, thread blocks in turn: slow, for n of some dozens, and open to sanitizers.
// Thread blocks are cut to two warps, which is enough for every race there is between warps.
#pragma once

#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // thread blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
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
constexpr unsigned kMostThreads = 2 * kWarpSize;

struct Warp {
  std::barrier<> barrier{kWarpSize};
  alignas(16) unsigned char exchange[kWarpSize][16];
};

struct ThreadBlock {
  std::barrier<> barrier;
  std::unique_ptr<Warp[]> warps;

  explicit ThreadBlock(unsigned threads)
      : barrier(threads), warps(std::make_unique<Warp[]>(threads / kWarpSize)) {}
};

inline ThreadBlock* current = nullptr;

}  // namespace emulate

inline void __syncthreads() {
  emulate::current->barrier.arrive_and_wait();
}

inline void __syncwarp(unsigned = ~0u) {
  emulate::current->warps[threadIdx.x / emulate::kWarpSize].barrier.arrive_and_wait();
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  static_assert(sizeof(T) <= 16);
  auto& exchange = emulate::current->warps[threadIdx.x / emulate::kWarpSize].exchange;
  const int lane = threadIdx.x % emulate::kWarpSize;
  std::memcpy(exchange[lane], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, exchange[lane ^ lanes], sizeof(T));
  __syncwarp();
  return value;
}

// One-dimensional grids of whole warps. Returns when the kernel is done.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim;
  dim3 block = config->blockDim;
  const bool flat = grid.y * grid.z * block.y * block.z == 1;
  if (!flat || grid.x == 0 || block.x == 0 || block.x % emulate::kWarpSize != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (block.x > emulate::kMostThreads) block.x = emulate::kMostThreads;
  emulate::ThreadBlock state(block.x);
  emulate::current = &state;
  gridDim = grid;
  blockDim = block;
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block.x; ++thread) {
    threads.emplace_back([=] {
      threadIdx = dim3(thread, 0, 0);
      for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = dim3(b, 0, 0);
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  emulate::current = nullptr;
  return cudaSuccess;
}
