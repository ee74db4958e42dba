// Packing of pieces of parameters into stacks, and the update of the pieces from the stacks: one
// launch each, three where the finite pieces alone are packed, whatever the number, shapes, strides
// and dtypes of the pieces. The table of pointers is in device memory, so that nothing waits for
// the host and a CUDA graph may hold the launch.
//
// Proven in emulation: the numbers and the bounds (tests/test_pack.py). Unproven until run on a
// GPU: the share of the bandwidth.
#include "cuda/launchers.h"
#include "cuda/pieces.h"

namespace shampoo {
namespace {

// packed <- data, with `negate` -data; 0 of the pieces whose squares, where there are any, are Inf
// or NaN.
__global__ void __launch_bounds__(kThreads, 1)
    pack_kernel(PieceTable pieces, bool negate, const double* squares) {
  const PieceChunk here = pieces.chunks[blockIdx.x];
  const Piece piece = pieces.pieces[here.piece];
  const bool finite = squares == nullptr || squares[here.piece] < INFINITY;
  const bool flip = negate && finite;
  with_type(piece.dtype, [&](auto from) {
    using From = decltype(from);
    with_type(piece.packed_dtype, [&](auto to) {
      using To = decltype(to);
      const From* data = static_cast<const From*>(piece.data);
      To* packed = static_cast<To*>(piece.packed);
      for_chunk(piece, here.chunk, [&](int64_t i, int64_t j, int count, int64_t at) {
        const From* source = data + i * piece.row_stride + j * piece.column_stride;
        Vector<From> x{};
        if (finite) x = load(source, piece.column_stride, count);
        store(packed + at, 1, count,
              [&](int e) { return flip ? number<To>(-x.v[e]) : number<To>(x.v[e]); });
      });
    });
  });
}

// sums[c] <- the sum of the squares of chunk c of the data.
__global__ void __launch_bounds__(kThreads, 1)
    chunk_squares_kernel(PieceTable pieces, double* sums) {
  const PieceChunk here = pieces.chunks[blockIdx.x];
  const Piece piece = pieces.pieces[here.piece];
  double sum = 0;
  with_type(piece.dtype, [&](auto from) {
    using From = decltype(from);
    const From* data = static_cast<const From*>(piece.data);
    for_chunk(piece, here.chunk, [&](int64_t i, int64_t j, int count, int64_t) {
      const From* source = data + i * piece.row_stride + j * piece.column_stride;
      const auto vector = load(source, piece.column_stride, count);  // 0 beyond count
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const double x = static_cast<double>(vector.v[e]);
        sum += x * x;
      }
    });
  });
  sum_of_chunk(sum, sums);
}

// decay W + step U, of which what has the factor 0 may be anything.
template <class C>
__device__ C combine(C decay, C W, C step, C U) {
  const C kept = decay == 0 ? C{0} : decay * W;
  return step == 0 ? kept : fma(step, U, kept);
}

template <bool kDouble>
struct Compute {
  using Type = float;
};
template <>
struct Compute<true> {
  using Type = double;
};

template <class F>
__global__ void __launch_bounds__(kThreads, 1)
    unpack_apply_kernel(PieceTable pieces, PieceFactors<F> factors) {
  const PieceChunk here = pieces.chunks[blockIdx.x];
  const Piece piece = pieces.pieces[here.piece];
  const F decay = factors.decay != nullptr ? factors.decay[here.piece] : F{0};
  const F step = factors.step != nullptr ? factors.step[here.piece] : F{1};
  if (decay == 1 && step == 0) return;
  with_type(piece.dtype, [&](auto of_data) {
    using T = decltype(of_data);
    with_type(piece.packed_dtype, [&](auto of_packed) {
      using P = decltype(of_packed);
      using C = typename Compute<sizeof(T) == 8 || sizeof(P) == 8>::Type;
      T* data = static_cast<T*>(piece.data);
      const P* packed = static_cast<const P*>(piece.packed);
      const C keep = static_cast<C>(decay), add = static_cast<C>(step);
      for_chunk(piece, here.chunk, [&](int64_t i, int64_t j, int count, int64_t at) {
        T* target = data + i * piece.row_stride + j * piece.column_stride;
        Vector<T> W{};
        if (keep != 0) W = load(target, piece.column_stride, count);
        Vector<P> U{};
        if (add != 0) U = load(packed + at, 1, count);
        store(target, piece.column_stride, count, [&](int e) {
          return number<T>(combine(keep, static_cast<C>(W.v[e]), add, static_cast<C>(U.v[e])));
        });
      });
    });
  });
}

}  // namespace

cudaError_t pack_cuda(const PieceTable& pieces, cudaStream_t stream) {
  return launch(pack_kernel, pieces.chunk_count, kThreads, 0, stream, pieces, false, nullptr);
}

cudaError_t pack_finite_cuda(const PieceTable& pieces, int64_t count, bool negate, double* sums,
                             double* squares, cudaStream_t stream) {
  cudaError_t error =
      launch(chunk_squares_kernel, pieces.chunk_count, kThreads, 0, stream, pieces, sums);
  if (error != cudaSuccess) return error;
  error =
      sum_chunks(pieces.pieces, count, pieces.chunks, pieces.chunk_count, sums, squares, stream);
  if (error != cudaSuccess) return error;
  return launch(pack_kernel, pieces.chunk_count, kThreads, 0, stream, pieces, negate, squares);
}

template <class F>
cudaError_t unpack_apply_cuda(const PieceTable& pieces, const PieceFactors<F>& factors,
                              cudaStream_t stream) {
  return launch(unpack_apply_kernel<F>, pieces.chunk_count, kThreads, 0, stream, pieces, factors);
}

template cudaError_t unpack_apply_cuda(const PieceTable&, const PieceFactors<float>&, cudaStream_t);
template cudaError_t unpack_apply_cuda(const PieceTable&, const PieceFactors<double>&,
                                       cudaStream_t);

}  // namespace shampoo
