// Symmetric products of matrices in shared memory, by multiply-adds of T.
#pragma once

#include "cuda/block_reduce.h"
#include "cuda/shared_memory.h"

namespace shampoo {

// What becomes of a product: D <- a I + b base + c A B; base is read where b != 0.
template <class T>
struct Epilogue {
  T a, b, c;
  const T* base;
};

// How far a matrix is from I: the part that this thread has written.
template <class T>
struct Distance {
  T largest = 0, squares = 0;

  __device__ void add(T difference, bool diagonal) {
    largest = Max::of(largest, difference < 0 ? -difference : difference);
    squares += (diagonal ? 1 : 2) * difference * difference;
  }
};

template <class T>
struct alignas(16) Four {
  T v[4];
};

// A, B, C, D are (n, n) in shared memory, symmetric and commuting, so that the product is symmetric
// too: its lower triangle is computed and mirrored. They have rows of leading() numbers, those from
// n on zero, and `rows()` rows.
//
// Threads take pairs (i, j), j <= i, of panels of kTile indices and hold a kTile x kTile tile in
// registers; panel i is the indices 4i..4i+3 and, for kTile = 8, those half a row further on, so
// that the four-number loads of neighbours lie side by side in the banks. Where the pairs just
// exceed the threads (n = 32: 36 for 32; 64 and 128: 136 for 128) the tiles left over are shared
// out in pieces of four numbers: that halves the threads, and with them the time (by count).
template <class T, int kTile>
class FfmaProduct {
 public:
  using Number = T;
  static constexpr int kMostThreads = sizeof(T) == 8 ? 288 : 128;
  static constexpr int kLeastBlocks = sizeof(T) == 4 && kTile == 4 ? 4 : 1;  // that share registers

  static __host__ __device__ int panels(int n) { return (n + kTile - 1) / kTile; }
  static __host__ __device__ int leading(int n) { return panels(n) * kTile; }
  static __host__ __device__ int rows(int n) { return n; }
  static int threads(int n) {
    const int half = (panels(n) * panels(n) / 2 + kWarpSize - 1) / kWarpSize * kWarpSize;
    return half > kWarpSize ? half : kWarpSize;
  }

  __device__ explicit FfmaProduct(int n)
      : n_(n), panels_(panels(n)), leading_(leading(n)), pairs_(panels_ * (panels_ + 1) / 2) {
    const int thread = threadIdx.x, threads = blockDim.x;
    owner_ = thread < pairs_;
    if (owner_) locate(thread, i_, j_);
    constexpr int kPieces = kTile * kTile / 4;
    const int pair = threads + thread / kPieces;
    sharer_ = pair < pairs_;
    if (sharer_) {
      int i, j;
      locate(pair, i, j);
      one_panel_ = i == j;
      const int piece = thread % kPieces;
      row_ = index(i, piece / (kTile / 4));
      column_ = index(j, piece % (kTile / 4) * 4);
    }
  }

  // D may be A, B or the base. Synchronises after reading A and B and at the end; what A, B and the
  // base hold must be visible before.
  __device__ Distance<T> operator()(const T* A, const T* B, T* D, const Epilogue<T>& then) const {
    T tile[kTile][kTile] = {}, piece[4] = {};
    if (owner_) multiply(A, B, tile);
    if (sharer_) {
      for (int k = 0; k < n_; ++k) {
        const T left = A[k * leading_ + row_];
        const auto right = load(B + k * leading_ + column_);
#pragma unroll
        for (int e = 0; e < 4; ++e) piece[e] += left * right.v[e];
      }
    }
    __syncthreads();
    Distance<T> distance;
    // Else 128 addresses computed ahead fill the registers; 32 of a smaller tile may.
    const int leading = kTile == 8 ? opaque(leading_) : leading_;
    if (owner_) {
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) {
          store(index(i_, r), index(j_, c), i_ == j_, tile[r][c], leading, D, then, distance);
        }
      }
    }
    if (sharer_) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        store(row_, column_ + e, one_panel_, piece[e], leading, D, then, distance);
    }
    __syncthreads();
    return distance;
  }

 private:
  static __device__ Four<T> load(const T* from) { return *reinterpret_cast<const Four<T>*>(from); }

  // Pair number `pair` in the order (0,0), (1,0), (1,1), (2,0), ...
  static __device__ void locate(int pair, int& i, int& j) {
    i = static_cast<int>((sqrtf(8.0f * static_cast<float>(pair) + 1) - 1) / 2);
    while ((i + 1) * (i + 2) / 2 <= pair) ++i;
    while (i * (i + 1) / 2 > pair) --i;
    j = pair - i * (i + 1) / 2;
  }

  __device__ int index(int panel, int e) const { return e / 4 * 4 * panels_ + 4 * panel + e % 4; }

  __device__ void multiply(const T* A, const T* B, T (&tile)[kTile][kTile]) const {
    const T *left = A + 4 * i_, *right = B + 4 * j_;
#pragma unroll 2
    for (int k = 0; k < n_; ++k) {
      T a[kTile], b[kTile];
#pragma unroll
      for (int g = 0; g < kTile; g += 4) {
        const auto l = load(left + k * leading_ + g * panels_);
        const auto r = load(right + k * leading_ + g * panels_);
#pragma unroll
        for (int e = 0; e < 4; ++e) a[g + e] = l.v[e], b[g + e] = r.v[e];
      }
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
#pragma unroll
        for (int c = 0; c < kTile; ++c) tile[r][c] += a[r] * b[c];
      }
    }
  }

  // Both (r, c) and (c, r); a pair of a panel with itself holds each of them once in r >= c.
  __device__ void store(int r, int c, bool one_panel, T sum, int leading, T* D,
                        const Epilogue<T>& then, Distance<T>& distance) const {
    if (r >= n_ || c >= n_ || (one_panel && r < c)) return;
    T value = then.c * sum;
    if (then.b != 0) value += then.b * then.base[r * leading + c];
    if (r == c) value += then.a;
    D[r * leading + c] = value;
    D[c * leading + r] = value;
    distance.add(value - (r == c ? T{1} : T{0}), r == c);
  }

  int n_, panels_, leading_, pairs_;
  bool owner_, sharer_, one_panel_ = false;
  int i_ = 0, j_ = 0, row_ = 0, column_ = 0;
};

}  // namespace shampoo
