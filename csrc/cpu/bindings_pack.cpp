// pack_ and unpack_apply_ on a CPU.
#include "bindings_pack.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void pack_(Tensor pieces, Tensor chunks) {
  shampoo::check_cpu("pack_", "chunks", chunks, 2);
  shampoo::pack(shampoo::pieces_of("pack_", pieces, chunks), shampoo::torch_threads());
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
  m.impl("unpack_apply_", TORCH_BOX(&unpack_apply_));
}
