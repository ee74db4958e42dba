// Packing of pieces of parameters into stacks, and their update from the stacks, by chunks of rows
// shared out over the threads.
#include <cmath>
#include <type_traits>
#include <vector>

#include "pieces.h"

namespace shampoo {
namespace {

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

void pack_chunk(const Piece& piece, int64_t chunk) {
  with_type(piece.dtype, [&](auto from) {
    with_type(piece.packed_dtype,
              [&](auto to) { pack_chunk<decltype(from), decltype(to)>(piece, chunk); });
  });
}

// The elements of a chunk of `packed`, in place: f(T*, count).
template <class F>
void for_packed(const Piece& piece, int64_t chunk, const F& f) {
  const int64_t begin = chunk * kChunkElements;
  const int64_t count = std::min(kChunkElements, piece.rows * piece.columns - begin);
  with_type(piece.packed_dtype,
            [&](auto x) { f(static_cast<decltype(x)*>(piece.packed) + begin, count); });
}

double chunk_squares(const Piece& piece, int64_t chunk) {
  double sum = 0;
  with_type(piece.dtype, [&](auto x) {
    using T = decltype(x);
    for_runs(piece, chunk, [&](int64_t i, int64_t j, int64_t count, int64_t) {
      const int64_t stride = piece.column_stride;
      const T* data = static_cast<const T*>(piece.data) + i * piece.row_stride + j * stride;
      sum += stride == 1 ? squares(data, count)
                         : squares(count, [&](int64_t e) { return double(data[e * stride]); });
    });
  });
  return sum;
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

}  // namespace

void pack(const PieceTable& pieces, const Parallel& parallel) {
  for_chunks(pieces.chunks, pieces.chunk_count, parallel,
             [&](PieceChunk here, int64_t) { pack_chunk(pieces.pieces[here.piece], here.chunk); });
}

void pack_finite(const PieceTable& pieces, int64_t count, bool negate, double* squares,
                 const Parallel& parallel) {
  std::vector<double> sums(pieces.chunk_count);
  for_chunks(pieces.chunks, pieces.chunk_count, parallel, [&](PieceChunk here, int64_t number) {
    sums[number] = chunk_squares(pieces.pieces[here.piece], here.chunk);
  });
  sum_chunks(pieces.chunks, pieces.chunk_count, count, sums.data(), squares);
  for (int64_t i = 0; i < count; ++i) {
    if (squares[i] > most_squares(pieces.pieces[i].dtype)) squares[i] = INFINITY;
  }
  for_chunks(pieces.chunks, pieces.chunk_count, parallel, [&](PieceChunk here, int64_t) {
    const Piece& piece = pieces.pieces[here.piece];
    const bool finite = squares[here.piece] < INFINITY;  // false for NaN
    if (finite) pack_chunk(piece, here.chunk);
    if (finite && !negate) return;
    for_packed(piece, here.chunk, [&](auto* to, int64_t elements) {
      using T = std::remove_reference_t<decltype(*to)>;
      for (int64_t e = 0; e < elements; ++e) to[e] = finite ? number<T>(-to[e]) : number<T>(0.0);
    });
  });
}

template <class F>
void unpack_apply(const PieceTable& pieces, const PieceFactors<F>& factors,
                  const Parallel& parallel) {
  for_chunks(pieces.chunks, pieces.chunk_count, parallel, [&](PieceChunk here, int64_t) {
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
