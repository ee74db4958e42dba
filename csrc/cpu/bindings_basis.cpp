// power_iteration and orthogonal_iteration_ on a CPU.
#include "bindings_matrices.h"

namespace {

using torch::stable::Tensor;

Tensor power_iteration(Tensor A, int64_t steps, int64_t vectors) {
  shampoo::check_power_iteration("power_iteration", A, steps, vectors);
  Tensor estimate = torch::stable::new_empty(A, {A.size(0)});
  shampoo::by_dtype(A, [&]<class T>(T) {
    shampoo::power_iteration(shampoo::symmetric_stack<T>(A), steps, vectors,
                             estimate.mutable_data_ptr<T>(), shampoo::torch_threads());
  });
  return estimate;
}

void orthogonal_iteration_(Tensor A, Tensor Q, double lift, int64_t steps, Tensor eigenvalues,
                           Tensor basis) {
  const char* op = "orthogonal_iteration_";
  shampoo::check_orthogonal_iteration(op, A, Q, eigenvalues, basis);
  STD_TORCH_CHECK(A.size(1) <= 32766, op, ": n > 32766 overflows LAPACK's sizes");
  shampoo::by_dtype(A, [&]<class T>(T) {
    shampoo::orthogonal_iteration(
        shampoo::orthogonal_iteration_of<T>(A, Q, lift, steps, eigenvalues, basis),
        shampoo::torch_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("power_iteration", TORCH_BOX(&power_iteration));
  m.impl("orthogonal_iteration_", TORCH_BOX(&orthogonal_iteration_));
}
