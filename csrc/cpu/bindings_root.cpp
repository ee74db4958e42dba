// eigenvalue_bound and the inverse roots on a CPU.
#include "bindings_matrices.h"

namespace {

using shampoo::inverse_root_of;
using shampoo::torch_threads;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor eigenvalue_bound(Tensor A) {
  shampoo::check_square_floats("eigenvalue_bound", A);
  Tensor bound = torch::stable::new_empty(A, {A.size(0)});
  shampoo::by_dtype(A, [&]<class T>(T) {
    shampoo::eigenvalue_bound(shampoo::symmetric_stack<T>(A), bound.mutable_data_ptr<T>(),
                              torch_threads());
  });
  return bound;
}

void inverse_root_eigh_(Tensor A, double p, double ridge, std::optional<double> rank_rtol,
                        std::optional<Tensor> scale, std::optional<Tensor> previous, Tensor root,
                        Tensor residual, Tensor status) {
  const char* op = "inverse_root_eigh_";
  shampoo::check_inverse_root(op, A, p, ridge, scale, previous, root, residual, status);
  STD_TORCH_CHECK(!(rank_rtol.value_or(0) < 0), op, ": rank_rtol must not be negative");
  shampoo::by_dtype(A, [&]<class T>(T) {
    shampoo::inverse_root_eigh<T>(
        inverse_root_of<T>(A, p, ridge, scale, previous, root, residual, status),
        rank_rtol.value_or(-1), torch_threads());
  });
}

// steps: (count, 5) float32, the coefficients a, b, c, s, t of every step.
void inverse_root_newton_(Tensor A, int64_t p, double ridge, Tensor steps,
                          std::optional<Tensor> scale, std::optional<Tensor> previous, Tensor root,
                          Tensor residual, Tensor status) {
  const char* op = "inverse_root_newton_";
  shampoo::check_inverse_root(op, A, double(p), ridge, scale, previous, root, residual, status);
  shampoo::check_same_dtype(op, "A", A, ScalarType::Float);
  shampoo::check_steps(op, steps, ScalarType::Float, 5, p);
  using Step = shampoo::NewtonSchedule::Step;
  shampoo::inverse_root_newton(
      inverse_root_of<float>(A, double(p), ridge, scale, previous, root, residual, status),
      {reinterpret_cast<const Step*>(steps.const_data_ptr<float>()), steps.size(0), uint32_t(p)},
      torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("eigenvalue_bound", TORCH_BOX(&eigenvalue_bound));
  m.impl("inverse_root_eigh_", TORCH_BOX(&inverse_root_eigh_));
  m.impl("inverse_root_newton_", TORCH_BOX(&inverse_root_newton_));
}
