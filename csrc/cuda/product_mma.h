// Symmetric products of float32 matrices in shared memory on tensor cores, as good as in float32:
// every number is split into two of tf32, x = high + low to 2^-22, and
//   A B = low(A) high(B) + high(A) low(B) + high(A) high(B),   without low(A) low(B).
#pragma once

#include "cuda/block_reduce.h"
#include "cuda/mma.h"
#include "cuda/product_ffma.h"

namespace shampoo {

// As FfmaProduct. Warps take 16 x 16 tiles of the lower triangle, at most three each (n = 128: 36
// tiles, 12 warps). Since B is symmetric, its columns are read as rows, and rows of leading() = 4
// (mod 8) numbers put the 8 x 4 numbers that a warp reads at a time into 32 banks.
class MmaProduct {
 public:
  using Number = float;
  static constexpr int kTile = 16, kMostTiles = 3, kMostThreads = 12 * kWarpSize;
  static constexpr int kLeastBlocks = 1;

  static __host__ __device__ int panels(int n) { return (n + kTile - 1) / kTile; }
  static __host__ __device__ int leading(int n) { return panels(n) * kTile + 4; }
  static __host__ __device__ int rows(int n) { return panels(n) * kTile; }
  static int threads(int n) {
    const int tiles = panels(n) * (panels(n) + 1) / 2, most = kMostThreads / kWarpSize;
    return (tiles < most ? tiles : most) * kWarpSize;
  }

  __device__ explicit MmaProduct(int n)
      : n_(n),
        leading_(leading(n)),
        tiles_(panels(n) * (panels(n) + 1) / 2),
        warp_(threadIdx.x / kWarpSize),
        warps_(blockDim.x / kWarpSize),
        g_(threadIdx.x % kWarpSize / 4),
        t_(threadIdx.x % 4) {}

  __device__ Distance<float> operator()(const float* A, const float* B, float* D,
                                        const Epilogue<float>& then) const {
    float sums[kMostTiles][2][4] = {};
#pragma unroll
    for (int of_mine = 0; of_mine < kMostTiles; ++of_mine) {
      int i, j;
      if (locate(warp_ + of_mine * warps_, i, j)) multiply(A, B, i, j, sums[of_mine]);
    }
    __syncthreads();
    Distance<float> distance;
#pragma unroll
    for (int of_mine = 0; of_mine < kMostTiles; ++of_mine) {
      int i, j;
      if (!locate(warp_ + of_mine * warps_, i, j)) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = i + g_ + e / 2 * 8, c = j + half * 8 + 2 * t_ + e % 2;
          store(r, c, sums[of_mine][half][e], D, then, distance);
        }
      }
    }
    __syncthreads();
    return distance;
  }

 private:
  // The first row and column of a tile of the lower triangle; the same for a whole warp.
  __device__ bool locate(int tile, int& i, int& j) const {
    if (tile >= tiles_) return false;
    i = 0;
    while ((i + 1) * (i + 2) / 2 <= tile) ++i;
    j = (tile - i * (i + 1) / 2) * kTile;
    i *= kTile;
    return true;
  }

  static __device__ void split(float x, uint32_t& high, uint32_t& low) {
    high = to_tf32(x);
    low = to_tf32(x - as_float(high));
  }

  static __device__ float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
  }

  __device__ void multiply(const float* A, const float* B, int i, int j,
                           float (&sums)[2][4]) const {
    for (int k = 0; k < n_; k += 8) {
      uint32_t high_a[4], low_a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = i + g_ + e % 2 * 8, column = k + t_ + e / 2 * 4;
        split(A[row * leading_ + column], high_a[e], low_a[e]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t high_b[2], low_b[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = j + half * 8 + g_, column = k + t_ + e * 4;
          split(B[row * leading_ + column], high_b[e], low_b[e]);
        }
        mma_16x8x8(sums[half], low_a, high_b);
        mma_16x8x8(sums[half], high_a, low_b);
        mma_16x8x8(sums[half], high_a, high_b);
      }
    }
  }

  __device__ void store(int r, int c, float sum, float* D, const Epilogue<float>& then,
                        Distance<float>& distance) const {
    if (r >= n_ || c > r) return;
    float value = then.c * sum;
    if (then.b != 0) value += then.b * then.base[r * leading_ + c];
    if (r == c) value += then.a;
    D[r * leading_ + c] = value;
    D[c * leading_ + r] = value;
    distance.add(value - (r == c ? 1.0f : 0.0f), r == c);
  }

  int n_, leading_, tiles_, warp_, warps_, g_, t_;
};

}  // namespace shampoo
