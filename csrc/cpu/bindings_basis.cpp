// power_iteration and orthogonal_iteration_ on a CPU.
#include "bindings.h"

namespace {

using shampoo::check_cpu;
using shampoo::check_size;
using torch::stable::Tensor;

// f(T{}) for the dtype of A.
template <class F>
void by_dtype(const Tensor& A, const F& f) {
  A.scalar_type() == torch::headeronly::ScalarType::Float ? f(float{}) : f(double{});
}

Tensor power_iteration(Tensor A, int64_t steps, int64_t vectors) {
  const char* op = "power_iteration";
  shampoo::check_symmetric_stack(op, A);
  STD_TORCH_CHECK(A.size(1) >= 1 && steps >= 1 && vectors >= 1, op,
                  ": n, steps and vectors must be at least 1");
  const int64_t blocks[] = {A.size(0)};
  Tensor estimate = torch::stable::new_empty(A, {blocks, 1});
  by_dtype(A, [&]<class T>(T) {
    shampoo::power_iteration(shampoo::symmetric_stack<T>(A), steps, vectors,
                             estimate.mutable_data_ptr<T>(), shampoo::torch_threads());
  });
  return estimate;
}

void orthogonal_iteration_(Tensor A, Tensor Q, double lift, int64_t steps, Tensor eigenvalues,
                           Tensor basis) {
  const char* op = "orthogonal_iteration_";
  shampoo::check_symmetric_stack(op, A);
  const int64_t blocks = A.size(0), n = A.size(1);
  auto check_like = [&](const char* name, const Tensor& t, int64_t dim) {
    check_cpu(op, name, t, dim);
    shampoo::check_same_dtype(op, name, t, A.scalar_type());
    check_size(op, name, t, 0, blocks);
    for (int64_t d = 1; d < dim; ++d) check_size(op, name, t, d, n);
  };
  check_like("Q", Q, 3);
  check_like("eigenvalues", eigenvalues, 2);
  check_like("basis", basis, 3);
  STD_TORCH_CHECK(eigenvalues.is_contiguous() && basis.is_contiguous(), op,
                  ": eigenvalues and basis must be contiguous");
  STD_TORCH_CHECK(n <= 32766, op, ": n > 32766 overflows LAPACK's sizes");
  by_dtype(A, [&]<class T>(T) {
    const shampoo::OrthogonalIteration<T> problem{
        blocks,
        n,
        {A.const_data_ptr<T>(), A.stride(0), A.stride(1), A.stride(2)},
        {Q.const_data_ptr<T>(), Q.stride(0), Q.stride(1), Q.stride(2)},
        lift,
        steps,
        eigenvalues.mutable_data_ptr<T>(),
        basis.mutable_data_ptr<T>()};
    shampoo::orthogonal_iteration(problem, shampoo::torch_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("power_iteration", TORCH_BOX(&power_iteration));
  m.impl("orthogonal_iteration_", TORCH_BOX(&orthogonal_iteration_));
}
