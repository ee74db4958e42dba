// Packing of pieces of parameters into stacks, and the update of the pieces from the stacks: one
// launch each, whatever the number, shapes, strides and dtypes of the pieces. The table of pointers
// is in device memory, so that nothing waits for the host and a CUDA graph may hold the launch.
//
// A thread block takes a chunk of one piece, a thread four neighbouring elements at a time: by one
// load and one store where all are aligned, else one by one.
//
// Proven in emulation: the numbers and the bounds (tests/test_pack.py). Unproven until run on a
// GPU: the share of the bandwidth.
#include "cuda/launchers.h"
#include "cuda/shared_memory.h"
#include "numbers.h"

namespace shampoo {
namespace {

constexpr int kThreads = 256, kVector = 4;

template <class T>
struct alignas(kVector * sizeof(T) < 16 ? kVector * sizeof(T) : 16) Vector {
  T v[kVector];
};

// f(T{}) with the type that `dtype` stands for.
template <class F>
__device__ void with_type(int64_t dtype, const F& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat64:
      return f(double{});
  }
}

__device__ bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

template <class T>
__device__ bool is_vector(const T* pointer) {
  return is_aligned(pointer, alignof(Vector<T>));
}

// f(i, j, count, at) for this thread's elements (i, j) ... (i, j + count - 1) of a chunk, numbers
// `at` ... of the piece; count is kVector, or 1 where the rows are no multiple of it.
template <class F>
__device__ void for_chunk(const Piece& piece, int64_t chunk, const F& f) {
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

__global__ void __launch_bounds__(kThreads, 1) pack_kernel(PieceTable pieces) {
  const PieceChunk here = pieces.chunks[blockIdx.x];
  const Piece piece = pieces.pieces[here.piece];
  with_type(piece.dtype, [&](auto from) {
    using From = decltype(from);
    with_type(piece.packed_dtype, [&](auto to) {
      using To = decltype(to);
      const From* data = static_cast<const From*>(piece.data);
      To* packed = static_cast<To*>(piece.packed);
      for_chunk(piece, here.chunk, [&](int64_t i, int64_t j, int count, int64_t at) {
        const From* source = data + i * piece.row_stride + j * piece.column_stride;
        const auto vector = load(source, piece.column_stride, count);
        store(packed + at, 1, count, [&](int e) { return number<To>(vector.v[e]); });
      });
    });
  });
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
  return launch(pack_kernel, pieces.chunk_count, kThreads, 0, stream, pieces);
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
