// The CUDA kernels as torch ops; the schemas are those of bindings.cpp.
#include "cuda/bindings_cuda.h"

#include "bindings_pack.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor eigenvalue_bound(Tensor A) {
  const char* op = "eigenvalue_bound";
  shampoo::check_square_floats(op, A);
  const shampoo::OnDevice here(A);
  Tensor bound = torch::stable::new_empty(A, {A.size(0)});
  const Tensor workspace = torch::stable::new_empty(
      A, {shampoo::eigenvalue_bound_workspace(A.size(0), A.size(1))}, ScalarType::Double);
  shampoo::by_dtype(A, [&]<class T>(T) {
    shampoo::check_launch(
        op, shampoo::eigenvalue_bound_cuda<T>(
                shampoo::symmetric_stack<T>(A), static_cast<double*>(workspace.mutable_data_ptr()),
                static_cast<T*>(bound.mutable_data_ptr()), here.stream));
  });
  return bound;
}

template <class T>
shampoo::RootSteps<T> root_steps(const Tensor& steps, int64_t p) {
  shampoo::RootSteps<T> found{};
  found.count = int(steps.size(0));
  found.p = uint32_t(p);
  const double* rows = steps.const_data_ptr<double>();
  for (int i = 0; i < found.count; ++i, rows += 6) {
    found.step[i] = {T(rows[0]), T(rows[1]), T(rows[2]), T(rows[3]), T(rows[4]), T(rows[5])};
  }
  return found;
}

void inverse_root_small_(Tensor A, int64_t p, double ridge, Tensor steps, bool tensor_cores,
                         std::optional<Tensor> scale, std::optional<Tensor> previous, Tensor root,
                         Tensor residual, Tensor status) {
  const char* op = "inverse_root_small_";
  shampoo::check_inverse_root(op, A, double(p), ridge, scale, previous, root, residual, status);
  shampoo::check_steps(op, steps, ScalarType::Double, 6, p);
  constexpr int64_t kMost = shampoo::RootSteps<float>::kMost;
  STD_TORCH_CHECK(steps.size(0) <= kMost, op, ": steps must be at most ", kMost);
  const shampoo::OnDevice here(A);
  shampoo::by_dtype(A, [&]<class T>(T) {
    const auto problem =
        shampoo::inverse_root_of<T>(A, double(p), ridge, scale, previous, root, residual, status);
    shampoo::check_launch(op, shampoo::inverse_root_small_cuda<T>(problem, root_steps<T>(steps, p),
                                                                  tensor_cores, here.stream));
  });
}

Tensor power_iteration(Tensor A, int64_t steps, int64_t vectors) {
  const char* op = "power_iteration";
  shampoo::check_power_iteration(op, A, steps, vectors);
  const shampoo::OnDevice here(A);
  Tensor estimate = torch::stable::new_empty(A, {A.size(0)});
  shampoo::by_dtype(A, [&]<class T>(T) {
    shampoo::check_launch(
        op, shampoo::power_iteration_cuda<T>(shampoo::symmetric_stack<T>(A), int(steps), vectors,
                                             estimate.mutable_data_ptr<T>(), here.stream));
  });
  return estimate;
}

void orthogonal_iteration_(Tensor A, Tensor Q, double lift, int64_t steps, Tensor eigenvalues,
                           Tensor basis) {
  const char* op = "orthogonal_iteration_";
  shampoo::check_orthogonal_iteration(op, A, Q, eigenvalues, basis);
  const shampoo::OnDevice here(A);
  shampoo::by_dtype(A, [&]<class T>(T) {
    const auto problem = shampoo::orthogonal_iteration_of<T>(A, Q, lift, steps, eigenvalues, basis);
    shampoo::check_launch(op, shampoo::orthogonal_iteration_cuda<T>(problem, here.stream));
  });
}

void pack_(Tensor pieces, Tensor chunks) {
  const auto table = shampoo::pieces_of("pack_", pieces, chunks);
  const shampoo::OnDevice here(pieces);
  shampoo::check_launch("pack_", shampoo::pack_cuda(table, here.stream));
}

void write_table_(Tensor to, Tensor from) {
  const char* op = "write_table_";
  shampoo::check_cpu(op, "from", from, to.dim());
  for (int64_t d = 0; d < to.dim(); ++d) shampoo::check_size(op, "from", from, d, to.size(d));
  for (const Tensor* table : {&to, &from}) {
    shampoo::check_same_dtype(op, "a table", *table, ScalarType::Long);
    STD_TORCH_CHECK(table->is_contiguous(), op, ": tables must be contiguous");
  }
  STD_TORCH_CHECK(!to.is_cpu(), op, ": to must be on a GPU");
  const shampoo::OnDevice here(to);
  shampoo::check_launch(op, shampoo::write_table_cuda(from.const_data_ptr<int64_t>(), from.numel(),
                                                      to.mutable_data_ptr<int64_t>(), here.stream));
}

// Room for a number of every chunk, (chunks,).
Tensor sums_of(const Tensor& chunks) {
  return torch::stable::new_empty(chunks, {chunks.size(0)}, ScalarType::Double);
}

Tensor pack_finite_(Tensor pieces, Tensor chunks, bool negate) {
  const char* op = "pack_finite_";
  const auto table = shampoo::pieces_of(op, pieces, chunks);
  const shampoo::OnDevice here(pieces);
  Tensor squares = torch::stable::new_empty(pieces, {pieces.size(0)}, ScalarType::Double);
  Tensor sums = sums_of(chunks);
  shampoo::check_launch(
      op, shampoo::pack_finite_cuda(table, pieces.size(0), negate, sums.mutable_data_ptr<double>(),
                                    squares.mutable_data_ptr<double>(), here.stream));
  return squares;
}

Tensor moments_(Tensor pieces, Tensor chunks, Tensor moves, Tensor steps, double beta1,
                double beta2, double eps, bool nesterov, bool sums, bool corrected) {
  const char* op = "moments_";
  const auto table = shampoo::moment_pieces_of(op, pieces, chunks, moves, steps);
  const shampoo::MomentRule rule{beta1, beta2, eps, nesterov, sums, corrected};
  const shampoo::OnDevice here(pieces);
  Tensor squares = torch::stable::new_empty(pieces, {table.count}, ScalarType::Double);
  Tensor room = sums_of(chunks);
  shampoo::by_dtype(moves, [&]<class T>(T) {
    shampoo::check_launch(
        op, shampoo::moments_cuda(table, rule, moves.const_data_ptr<T>(), steps.const_data_ptr<T>(),
                                  room.mutable_data_ptr<double>(),
                                  squares.mutable_data_ptr<double>(), here.stream));
  });
  return squares;
}

void unpack_apply_(Tensor pieces, Tensor chunks, std::optional<Tensor> decay,
                   std::optional<Tensor> step) {
  const char* op = "unpack_apply_";
  const auto table = shampoo::pieces_of(op, pieces, chunks);
  const shampoo::OnDevice here(pieces);
  shampoo::with_factors(op, pieces, decay, step, [&](auto factors) {
    shampoo::check_launch(op, shampoo::unpack_apply_cuda(table, factors, here.stream));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CUDA, m) {
  m.impl("eigenvalue_bound", TORCH_BOX(&eigenvalue_bound));
  m.impl("inverse_root_small_", TORCH_BOX(&inverse_root_small_));
  m.impl("power_iteration", TORCH_BOX(&power_iteration));
  m.impl("orthogonal_iteration_", TORCH_BOX(&orthogonal_iteration_));
  m.impl("pack_", TORCH_BOX(&pack_));
  m.impl("write_table_", TORCH_BOX(&write_table_));
  m.impl("pack_finite_", TORCH_BOX(&pack_finite_));
  m.impl("moments_", TORCH_BOX(&moments_));
  m.impl("unpack_apply_", TORCH_BOX(&unpack_apply_));
}
