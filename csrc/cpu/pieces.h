// Pieces of many tensors by chunks: what packing, updating and averaging them have in common.
#pragma once

#include <algorithm>

#include "../dtypes.h"
#include "parallel.h"
#include "squares.h"

namespace shampoo {

// f(row, column, count, at) for every run of at most kMost neighbours in a chunk, whose first
// element is number `at` of the piece: in a row, or across rows where they follow on each other.
template <int64_t kMost = kChunkElements, class P, class F>
void for_runs(const P& piece, int64_t chunk, const F& f) {
  const bool whole = piece.column_stride == 1 && piece.row_stride == piece.columns;
  int64_t at = chunk * kChunkElements;
  const int64_t end = std::min(at + kChunkElements, piece.rows * piece.columns);
  while (at < end) {
    const int64_t row = at / piece.columns, column = at % piece.columns;
    const int64_t left = whole ? kMost : std::min(kMost, piece.columns - column);
    const int64_t count = std::min(end - at, left);
    f(row, column, count, at);
    at += count;
  }
}

// f(chunk, its number) for every chunk, on the caller's threads.
template <class F>
void for_chunks(const PieceChunk* chunks, int64_t count, const Parallel& parallel, const F& f) {
  constexpr int64_t kGrain = 4;  // chunks: less is not worth waking a thread for
  for_each(parallel, count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(chunks[c], c);
  });
}

// out[i] <- the sum of sums[c] over the chunks c of piece i, in order: the same for any threads.
inline void sum_chunks(const PieceChunk* chunks, int64_t chunk_count, int64_t pieces,
                       const double* sums, double* out) {
  std::fill(out, out + pieces, 0.0);
  for (int64_t c = 0; c < chunk_count; ++c) out[chunks[c].piece] += sums[c];
}

}  // namespace shampoo
