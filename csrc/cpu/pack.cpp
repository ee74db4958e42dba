// Packing of pieces of parameters into stacks, and their update from the stacks, by chunks of rows
// shared out over the threads.
#include <algorithm>
#include <type_traits>

#include "../kernels.h"
#include "../numbers.h"
#include "parallel.h"

namespace shampoo {
namespace {

// f(T{}) with the type that `dtype` stands for.
template <class F>
void with_type(int64_t dtype, const F& f) {
  switch (DType(dtype)) {
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

// f(row, column, count, at) for every run of a row in a chunk, whose first element is number `at`
// of the piece.
template <class F>
void for_runs(const Piece& piece, int64_t chunk, const F& f) {
  int64_t at = chunk * kChunkElements;
  const int64_t end = std::min(at + kChunkElements, piece.rows * piece.columns);
  while (at < end) {
    const int64_t row = at / piece.columns, column = at % piece.columns;
    const int64_t count = std::min(end - at, piece.columns - column);
    f(row, column, count, at);
    at += count;
  }
}

template <class From, class To>
void pack_chunk(const Piece& piece, int64_t chunk) {
  for_runs(piece, chunk, [&](int64_t i, int64_t j, int64_t count, int64_t at) {
    const int64_t stride = piece.column_stride;
    const From* __restrict from =
        static_cast<const From*>(piece.data) + i * piece.row_stride + j * stride;
    To* __restrict to = static_cast<To*>(piece.packed) + at;
    if constexpr (sizeof(From) == sizeof(To) && sizeof(From) != 2) {
      if (stride == 1) {
        std::copy(from, from + count, to);
        return;
      }
    }
    if (stride == 1) {
      for (int64_t e = 0; e < count; ++e) to[e] = number<To>(from[e]);
    } else {
      for (int64_t e = 0; e < count; ++e) to[e] = number<To>(from[e * stride]);
    }
  });
}

// data <- decay data + step packed on a run; what has the factor 0 is not read.
template <class C, class T, class P>
void update_run(T* __restrict data, int64_t stride, const P* __restrict packed, int64_t count,
                C decay, C step) {
  if (decay == 0 && step == 1) {
    for (int64_t e = 0; e < count; ++e) data[e * stride] = number<T>(C(packed[e]));
  } else if (decay == 0 && step == 0) {
    for (int64_t e = 0; e < count; ++e) data[e * stride] = number<T>(C{0});
  } else if (decay == 0) {
    for (int64_t e = 0; e < count; ++e) data[e * stride] = number<T>(step * C(packed[e]));
  } else if (step == 0) {
    for (int64_t e = 0; e < count; ++e) data[e * stride] = number<T>(decay * C(data[e * stride]));
  } else if (stride == 1) {
    for (int64_t e = 0; e < count; ++e) {
      data[e] = number<T>(decay * C(data[e]) + step * C(packed[e]));
    }
  } else {
    for (int64_t e = 0; e < count; ++e) {
      data[e * stride] = number<T>(decay * C(data[e * stride]) + step * C(packed[e]));
    }
  }
}

template <class T, class P, class F>
void update_chunk(const Piece& piece, int64_t chunk, F decay, F step) {
  using C = std::conditional_t<sizeof(T) == 8 || sizeof(P) == 8, double, float>;
  for_runs(piece, chunk, [&](int64_t i, int64_t j, int64_t count, int64_t at) {
    T* data = static_cast<T*>(piece.data) + i * piece.row_stride + j * piece.column_stride;
    const P* packed = static_cast<const P*>(piece.packed) + at;
    update_run<C>(data, piece.column_stride, packed, count, C(decay), C(step));
  });
}

// f(chunk) for every chunk, on the caller's threads.
template <class F>
void for_chunks(const PieceTable& pieces, const Parallel& parallel, const F& f) {
  constexpr int64_t kGrain = 4;  // chunks: less is not worth waking a thread for
  for_each(parallel, pieces.chunk_count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(pieces.chunks[c]);
  });
}

}  // namespace

void pack(const PieceTable& pieces, const Parallel& parallel) {
  for_chunks(pieces, parallel, [&](PieceChunk here) {
    const Piece& piece = pieces.pieces[here.piece];
    with_type(piece.dtype, [&](auto from) {
      with_type(piece.packed_dtype,
                [&](auto to) { pack_chunk<decltype(from), decltype(to)>(piece, here.chunk); });
    });
  });
}

template <class F>
void unpack_apply(const PieceTable& pieces, const PieceFactors<F>& factors,
                  const Parallel& parallel) {
  for_chunks(pieces, parallel, [&](PieceChunk here) {
    const Piece& piece = pieces.pieces[here.piece];
    const F decay = factors.decay ? factors.decay[here.piece] : F{0};
    const F step = factors.step ? factors.step[here.piece] : F{1};
    if (decay == 1 && step == 0) return;
    with_type(piece.dtype, [&](auto data) {
      with_type(piece.packed_dtype, [&](auto packed) {
        update_chunk<decltype(data), decltype(packed)>(piece, here.chunk, decay, step);
      });
    });
  });
}

template void unpack_apply(const PieceTable&, const PieceFactors<float>&, const Parallel&);
template void unpack_apply(const PieceTable&, const PieceFactors<double>&, const Parallel&);

}  // namespace shampoo
