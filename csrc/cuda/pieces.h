// Chunks of pieces of many tensors, a thread block each: what packing, updating and averaging them
// have in common. A thread takes four neighbouring elements at a time: by one load and one store
// where all are aligned, else one by one.
#pragma once

#include "cuda/block_reduce.h"
#include "cuda/shared_memory.h"
#include "dtypes.h"

namespace shampoo {
namespace {  // internal: kernels of the same name stand in several files

constexpr int kThreads = 256, kVector = 4;

template <class T>
struct alignas(kVector * sizeof(T) < 16 ? kVector * sizeof(T) : 16) Vector {
  T v[kVector];
};

__device__ inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <class T>
__device__ bool is_vector(const T* pointer) {
  return is_aligned(pointer, alignof(Vector<T>));
}

// f(i, j, count, at) for this thread's elements (i, j) ... (i, j + count - 1) of a chunk, numbers
// `at` ... of the piece; count is kVector, or 1 where the rows are no multiple of it.
template <class P, class F>
__device__ void for_chunk(const P& piece, int64_t chunk, const F& f) {
  const int64_t size = piece.rows * piece.columns, first = chunk * kChunkElements;
  const int64_t first_row = first / piece.columns, first_column = first % piece.columns;
  const int count = piece.columns % kVector == 0 ? kVector : 1;
  const int elements =
      static_cast<int>(size - first < kChunkElements ? size - first : kChunkElements);
  for (int local = threadIdx.x * count; local < elements; local += kThreads * count) {
    int64_t i = first_row, j = first_column + local;
    if (piece.columns < kChunkElements) {  // small numbers divide fast
      const auto at = static_cast<uint32_t>(j), columns = static_cast<uint32_t>(piece.columns);
      i += at / columns;
      j = at % columns;
    } else if (j >= piece.columns) {  // at most one row further
      ++i;
      j -= piece.columns;
    }
    f(i, j, count, first + local);
  }
}

// to[at..] <- of(e) for `count` elements.
template <class T, class F>
__device__ void store(T* to, int64_t stride, int count, const F& of) {
  if (count == kVector && stride == 1 && is_vector(to)) {
    Vector<T> vector;
#pragma unroll
    for (int e = 0; e < kVector; ++e) vector.v[e] = of(e);
    *reinterpret_cast<Vector<T>*>(to) = vector;
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < count) to[e * stride] = of(e);
    }
  }
}

template <class T>
__device__ Vector<T> load(const T* from, int64_t stride, int count) {
  if (count == kVector && stride == 1 && is_vector(from)) {
    return *reinterpret_cast<const Vector<T>*>(from);
  }
  Vector<T> vector{};
#pragma unroll
  for (int e = 0; e < kVector; ++e) {
    if (e < count) vector.v[e] = from[e * stride];
  }
  return vector;
}

// sums[blockIdx.x] <- the sum of the numbers of all threads.
__device__ inline void sum_of_chunk(double number, double* sums) {
  __shared__ WarpScratch<double> scratch;
  const double sum = block_reduce<Sum>(number, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Sums of squares above this are Inf.
__device__ inline double limit_of(const Piece& piece) {
  return most_squares(piece.dtype);
}
__device__ inline double limit_of(const MomentPiece&) {
  return INFINITY;
}

// squares[i] <- the sum of sums[c] over the chunks c of piece i, in an order that depends on their
// number alone. A warp for every piece, the one whose number is that of its first chunk; a piece
// without chunks has 0.
template <class P>
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(const P* pieces, int64_t count, const PieceChunk* chunks, int64_t chunk_count,
                      const double* sums, double* squares) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t c = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  if (c < count && pieces[c].rows * pieces[c].columns == 0 && lane == 0) squares[c] = 0;
  if (c >= chunk_count || chunks[c].chunk != 0) return;
  const int32_t i = chunks[c].piece;
  const P piece = pieces[i];
  const int64_t mine = (piece.rows * piece.columns + kChunkElements - 1) / kChunkElements;
  double sum = 0;
  for (int64_t k = lane; k < mine; k += kWarpSize) sum += sums[c + k];
  sum = warp_reduce<Sum>(sum);
  if (lane == 0) squares[i] = sum > limit_of(piece) ? INFINITY : sum;
}

template <class P>
cudaError_t sum_chunks(const P* pieces, int64_t count, const PieceChunk* chunks,
                       int64_t chunk_count, const double* sums, double* squares,
                       cudaStream_t stream) {
  constexpr int64_t kWarps = kThreads / kWarpSize;
  const int64_t tasks = count > chunk_count ? count : chunk_count;
  return launch(sum_chunks_kernel<P>, (tasks + kWarps - 1) / kWarps, kThreads, 0, stream, pieces,
                count, chunks, chunk_count, sums, squares);
}

}  // namespace
}  // namespace shampoo
