// Momentum and second moments of the pieces of many tensors, and the step of the graft that comes
// of them: one pass over memory in one launch, and a small one for the norms. The table is in
// device memory, as in pack.cu.
//
// Proven in emulation: the numbers and the bounds (tests/test_moments.py). Unproven until run on a
// GPU: the share of the bandwidth.
#include "moments.h"

#include "cuda/launchers.h"
#include "cuda/pieces.h"

namespace shampoo {
namespace {

// x moves to keep x + add y.
template <class T>
__device__ Vector<T> moved(T keep, const Vector<T>& x, T add, const Vector<T>& y) {
  Vector<T> result;
#pragma unroll
  for (int e = 0; e < kVector; ++e) result.v[e] = keep * x.v[e] + add * y.v[e];
  return result;
}

template <class T>
__device__ Vector<T> squared(const Vector<T>& x) {
  Vector<T> result;
#pragma unroll
  for (int e = 0; e < kVector; ++e) result.v[e] = x.v[e] * x.v[e];
  return result;
}

// Neighbours in memory, and the same ones in what is contiguous; returns the sum of the squares of
// their steps.
template <class T>
__device__ double average(const MomentPiece& piece, int64_t offset, int64_t at, int count,
                          const MomentFactors<T>& f) {
  const int64_t stride = piece.column_stride;
  auto put = [&](T* to, int64_t step, const Vector<T>& x) {
    store(to, step, count, [&](int e) { return x.v[e]; });
  };
  T* exp_avg = static_cast<T*>(piece.exp_avg) + offset;
  Vector<T> g{}, m = load(exp_avg, stride, count), v{};
  if (f.moves) {
    g = load(static_cast<const T*>(piece.grad) + at, 1, count);
    m = moved(f.keep1, m, f.add1, g);
    put(exp_avg, stride, m);
    if (f.nesterov) m = moved(f.keep1, m, f.add1, g);
  }
  put(static_cast<T*>(piece.momentum) + at, 1, m);
  if (piece.exp_avg_sq != nullptr) {
    T* exp_avg_sq = static_cast<T*>(piece.exp_avg_sq) + offset;
    v = load(exp_avg_sq, stride, count);
    if (f.moves) {
      v = moved(f.keep2, v, f.add2, squared(g));
      put(exp_avg_sq, stride, v);
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < count) m.v[e] /= std::sqrt(v.v[e]) + f.eps;
    }
    if (piece.own != nullptr) put(static_cast<T*>(piece.own) + at, 1, m);
  }
  double sum = 0;
#pragma unroll
  for (int e = 0; e < kVector; ++e) {  // m is 0 beyond count
    sum += static_cast<double>(m.v[e]) * static_cast<double>(m.v[e]);
  }
  return sum;
}

// sums[c] <- the sum of the squares of the steps in chunk c.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    moments_kernel(MomentTable table, MomentRule rule, const T* moves, const T* steps,
                   double* sums) {
  const PieceChunk here = table.chunks[blockIdx.x];
  const MomentPiece piece = table.pieces[here.piece];
  const MomentFactors<T> factors(rule, moves[here.piece], steps[here.piece]);
  double sum = 0;
  for_chunk(piece, here.chunk, [&](int64_t i, int64_t j, int count, int64_t at) {
    sum += average(piece, i * piece.row_stride + j * piece.column_stride, at, count, factors);
  });
  sum_of_chunk(sum, sums);
}

}  // namespace

template <class T>
cudaError_t moments_cuda(const MomentTable& table, const MomentRule& rule, const T* moves,
                         const T* steps, double* sums, double* squares, cudaStream_t stream) {
  const cudaError_t error = launch(moments_kernel<T>, table.chunk_count, kThreads, 0, stream, table,
                                   rule, moves, steps, sums);
  if (error != cudaSuccess) return error;
  return sum_chunks(table.pieces, table.count, table.chunks, table.chunk_count, sums, squares,
                    stream);
}

template cudaError_t moments_cuda(const MomentTable&, const MomentRule&, const float*, const float*,
                                  double*, double*, cudaStream_t);
template cudaError_t moments_cuda(const MomentTable&, const MomentRule&, const double*,
                                  const double*, double*, double*, cudaStream_t);

}  // namespace shampoo
