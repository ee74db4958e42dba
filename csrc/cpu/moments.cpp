// Momentum and second moments of the pieces of many tensors, and the step of the graft that comes
// of them, in one pass over memory, by chunks of rows shared out over the threads.
#include "../moments.h"

#include <vector>

#include "pieces.h"
#include "wide.h"

namespace shampoo {
namespace {

// Square roots and divisions are worth wide vectors; the bits are the same in any.
SHAMPOO_WIDE void steps(float* __restrict out, const float* __restrict momentum,
                        const float* __restrict v, float eps, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = momentum[e] / (std::sqrt(v[e]) + eps);
}
SHAMPOO_WIDE void steps(double* __restrict out, const double* __restrict momentum,
                        const double* __restrict v, double eps, int64_t count) {
  for (int64_t e = 0; e < count; ++e) out[e] = momentum[e] / (std::sqrt(v[e]) + eps);
}

constexpr int64_t kRun = 1024;  // neighbours at a time, which stay in the first cache

// At most kRun neighbours; returns the sum of the squares of their steps.
template <class T>
double average_run(T* __restrict m, T* __restrict v, int64_t stride, const T* __restrict g,
                   T* __restrict momentum, T* __restrict own, int64_t count,
                   const MomentFactors<T>& f) {
  if (f.moves) {
    for (int64_t e = 0; e < count; ++e) m[e * stride] = f.keep1 * m[e * stride] + f.add1 * g[e];
  }
  if (f.moves && f.nesterov) {
    for (int64_t e = 0; e < count; ++e) momentum[e] = f.keep1 * m[e * stride] + f.add1 * g[e];
  } else {
    for (int64_t e = 0; e < count; ++e) momentum[e] = m[e * stride];
  }
  if (!v) return squares(momentum, count);
  if (f.moves) {
    for (int64_t e = 0; e < count; ++e) {
      v[e * stride] = f.keep2 * v[e * stride] + f.add2 * g[e] * g[e];
    }
  }
  T unasked[kRun], dense[kRun];
  if (stride != 1) {
    for (int64_t e = 0; e < count; ++e) dense[e] = v[e * stride];
  }
  T* step = own ? own : unasked;
  steps(step, momentum, stride == 1 ? v : dense, f.eps, count);
  return squares(step, count);
}

template <class T>
double average_chunk(const MomentPiece& piece, int64_t chunk, const MomentFactors<T>& factors) {
  double sum = 0;
  for_runs<kRun>(piece, chunk, [&](int64_t i, int64_t j, int64_t count, int64_t at) {
    const int64_t stride = piece.column_stride, from = i * piece.row_stride + j * stride;
    auto there = [&](void* data, int64_t offset) {
      return data ? static_cast<T*>(data) + offset : nullptr;
    };
    auto run = [&](int64_t step) {  // a constant 1 lets the loops be vectors
      return average_run(there(piece.exp_avg, from), there(piece.exp_avg_sq, from), step,
                         static_cast<const T*>(piece.grad) + at, there(piece.momentum, at),
                         there(piece.own, at), count, factors);
    };
    sum += stride == 1 ? run(1) : run(stride);
  });
  return sum;
}

}  // namespace

template <class T>
void moments(const MomentTable& table, const MomentRule& rule, const T* moves, const T* steps,
             double* squares, const Parallel& parallel) {
  std::vector<double> sums(table.chunk_count);
  for_chunks(table.chunks, table.chunk_count, parallel, [&](PieceChunk here, int64_t number) {
    const MomentFactors<T> factors(rule, moves[here.piece], steps[here.piece]);
    sums[number] = average_chunk(table.pieces[here.piece], here.chunk, factors);
  });
  sum_chunks(table.chunks, table.chunk_count, table.count, sums.data(), squares);
}

template void moments(const MomentTable&, const MomentRule&, const float*, const float*, double*,
                      const Parallel&);
template void moments(const MomentTable&, const MomentRule&, const double*, const double*, double*,
                      const Parallel&);

}  // namespace shampoo
