// The ops on the pieces of many tensors on a CPU.
#include "bindings_pack.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void pack_(Tensor pieces, Tensor chunks) {
  shampoo::check_cpu("pack_", "chunks", chunks, 2);
  shampoo::pack(shampoo::pieces_of("pack_", pieces, chunks), shampoo::torch_threads());
}

Tensor pack_finite_(Tensor pieces, Tensor chunks, bool negate) {
  shampoo::check_cpu("pack_finite_", "chunks", chunks, 2);
  const shampoo::PieceTable table = shampoo::pieces_of("pack_finite_", pieces, chunks);
  Tensor squares = torch::stable::new_empty(pieces, {pieces.size(0)}, ScalarType::Double);
  shampoo::pack_finite(table, pieces.size(0), negate, squares.mutable_data_ptr<double>(),
                       shampoo::torch_threads());
  return squares;
}

Tensor moments_(Tensor pieces, Tensor chunks, Tensor moves, Tensor steps, double beta1,
                double beta2, double eps, bool nesterov, bool sums, bool corrected) {
  const char* op = "moments_";
  shampoo::check_cpu(op, "chunks", chunks, 2);
  shampoo::check_cpu(op, "moves", moves, 1);
  const shampoo::MomentTable table = shampoo::moment_pieces_of(op, pieces, chunks, moves, steps);
  const shampoo::MomentRule rule{beta1, beta2, eps, nesterov, sums, corrected};
  Tensor squares = torch::stable::new_empty(pieces, {table.count}, ScalarType::Double);
  auto run = [&]<class T>(T) {
    shampoo::moments(table, rule, moves.const_data_ptr<T>(), steps.const_data_ptr<T>(),
                     squares.mutable_data_ptr<double>(), shampoo::torch_threads());
  };
  moves.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return squares;
}

void unpack_apply_(Tensor pieces, Tensor chunks, std::optional<Tensor> decay,
                   std::optional<Tensor> step) {
  const char* op = "unpack_apply_";
  shampoo::check_cpu(op, "chunks", chunks, 2);
  const shampoo::PieceTable table = shampoo::pieces_of(op, pieces, chunks);
  shampoo::with_factors(op, pieces, decay, step, [&](auto factors) {
    shampoo::unpack_apply(table, factors, shampoo::torch_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("pack_", TORCH_BOX(&pack_));
  m.impl("pack_finite_", TORCH_BOX(&pack_finite_));
  m.impl("moments_", TORCH_BOX(&moments_));
  m.impl("unpack_apply_", TORCH_BOX(&unpack_apply_));
}
