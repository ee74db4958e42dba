// The tables of pack_ and unpack_apply_ as tensors, on a CPU and on a GPU.
#pragma once

#include "bindings.h"

namespace shampoo {

inline PieceTable pieces_of(const char* op, const Tensor& pieces, const Tensor& chunks) {
  STD_TORCH_CHECK(pieces.scalar_type() == ScalarType::Long && pieces.dim() == 2 &&
                      pieces.size(1) == 8 && pieces.is_contiguous(),
                  op, ": pieces must be a contiguous (pieces, 8) int64 tensor");
  STD_TORCH_CHECK(chunks.scalar_type() == ScalarType::Int && chunks.dim() == 2 &&
                      chunks.size(1) == 2 && chunks.is_contiguous(),
                  op, ": chunks must be a contiguous (chunks, 2) int32 tensor");
  STD_TORCH_CHECK(pieces.is_cpu() == chunks.is_cpu(), op, ": the tables must be on one device");
  return {static_cast<const Piece*>(pieces.const_data_ptr()),
          static_cast<const PieceChunk*>(chunks.const_data_ptr()), chunks.size(0)};
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
