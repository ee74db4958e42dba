// The tables of the ops on pieces as tensors, on a CPU and on a GPU.
#pragma once

#include "bindings.h"

namespace shampoo {

inline void check_table(const char* op, const Tensor& pieces, int64_t columns,
                        const Tensor& chunks) {
  STD_TORCH_CHECK(pieces.scalar_type() == ScalarType::Long && pieces.dim() == 2 &&
                      pieces.size(1) == columns && pieces.is_contiguous(),
                  op, ": pieces must be a contiguous (pieces, ", columns, ") int64 tensor");
  STD_TORCH_CHECK(chunks.scalar_type() == ScalarType::Int && chunks.dim() == 2 &&
                      chunks.size(1) == 2 && chunks.is_contiguous(),
                  op, ": chunks must be a contiguous (chunks, 2) int32 tensor");
  STD_TORCH_CHECK(pieces.is_cpu() == chunks.is_cpu(), op, ": the tables must be on one device");
}

inline PieceTable pieces_of(const char* op, const Tensor& pieces, const Tensor& chunks) {
  check_table(op, pieces, 8, chunks);
  return {static_cast<const Piece*>(pieces.const_data_ptr()),
          static_cast<const PieceChunk*>(chunks.const_data_ptr()), chunks.size(0)};
}

inline MomentTable moment_pieces_of(const char* op, const Tensor& pieces, const Tensor& chunks,
                                    const Tensor& moves, const Tensor& steps) {
  check_table(op, pieces, 9, chunks);
  STD_TORCH_CHECK(
      moves.scalar_type() == ScalarType::Float || moves.scalar_type() == ScalarType::Double, op,
      ": moves must be float32 or float64");
  for (const Tensor* x : {&moves, &steps}) {
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == pieces.size(0) && x->is_contiguous() &&
                        x->is_cpu() == pieces.is_cpu(),
                    op, ": moves and steps must hold one number per piece, on its device");
  }
  check_same_dtype(op, "steps", steps, moves.scalar_type());
  return {static_cast<const MomentPiece*>(pieces.const_data_ptr()),
          static_cast<const PieceChunk*>(chunks.const_data_ptr()), pieces.size(0), chunks.size(0)};
}

// f(PieceFactors<float or double>): both factors, one per piece, or neither.
template <class F>
void with_factors(const char* op, const Tensor& pieces, const std::optional<Tensor>& decay,
                  const std::optional<Tensor>& step, const F& f) {
  STD_TORCH_CHECK(decay.has_value() == step.has_value(), op,
                  ": decay and step come together or not at all");
  if (!decay.has_value()) return f(PieceFactors<float>{nullptr, nullptr});
  for (const Tensor* factor : {&*decay, &*step}) {
    STD_TORCH_CHECK(factor->dim() == 1 && factor->size(0) == pieces.size(0) &&
                        factor->is_contiguous() && factor->is_cpu() == pieces.is_cpu(),
                    op, ": decay and step must hold one number per piece, on its device");
    check_same_dtype(op, "step", *factor, decay->scalar_type());
  }
  if (decay->scalar_type() == ScalarType::Double) {
    f(PieceFactors<double>{decay->const_data_ptr<double>(), step->const_data_ptr<double>()});
  } else {
    check_same_dtype(op, "decay", *decay, ScalarType::Float);
    f(PieceFactors<float>{decay->const_data_ptr<float>(), step->const_data_ptr<float>()});
  }
}

}  // namespace shampoo
