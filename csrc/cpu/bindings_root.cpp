// eigenvalue_bound and the inverse roots on a CPU.
#include "bindings.h"

namespace {

using shampoo::check_cpu;
using shampoo::check_same_dtype;
using shampoo::check_size;
using shampoo::check_symmetric_stack;
using shampoo::symmetric_stack;
using shampoo::torch_threads;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor eigenvalue_bound(Tensor A) {
  check_symmetric_stack("eigenvalue_bound", A);
  const int64_t blocks[] = {A.size(0)};
  Tensor bound = torch::stable::new_empty(A, {blocks, 1});
  if (A.scalar_type() == ScalarType::Float) {
    shampoo::eigenvalue_bound(symmetric_stack<float>(A), bound.mutable_data_ptr<float>(),
                              torch_threads());
  } else {
    shampoo::eigenvalue_bound(symmetric_stack<double>(A), bound.mutable_data_ptr<double>(),
                              torch_threads());
  }
  return bound;
}

template <class T>
shampoo::InverseRoot<T> inverse_root(const Tensor& A, double p, double ridge,
                                     const std::optional<Tensor>& previous, Tensor& root,
                                     Tensor& residual, Tensor& status) {
  const T* kept = previous.has_value() ? previous->const_data_ptr<T>() : nullptr;
  auto stride = [&](int dim) { return kept ? previous->stride(dim) : 0; };
  return {symmetric_stack<T>(A),
          p,
          ridge,
          kept,
          stride(0),
          stride(1),
          stride(2),
          root.mutable_data_ptr<T>(),
          residual.mutable_data_ptr<T>(),
          status.mutable_data_ptr<int8_t>()};
}

void check_inverse_root(const char* op, const Tensor& A, double p, double ridge,
                        const std::optional<Tensor>& previous, const Tensor& root,
                        const Tensor& residual, const Tensor& status) {
  check_symmetric_stack(op, A);
  const int64_t blocks = A.size(0), n = A.size(1);
  auto check_like_A = [&](const char* name, const Tensor& t) {
    check_cpu(op, name, t, 3);
    check_same_dtype(op, name, t, A.scalar_type());
    check_size(op, name, t, 0, blocks);
    check_size(op, name, t, 1, n);
    check_size(op, name, t, 2, n);
  };
  auto check_per_block = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_cpu(op, name, t, 1);
    check_same_dtype(op, name, t, dtype);
    check_size(op, name, t, 0, blocks);
    STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  };
  check_like_A("root", root);
  STD_TORCH_CHECK(root.is_contiguous(), op, ": root must be contiguous");
  if (previous.has_value()) check_like_A("previous", *previous);
  check_per_block("residual", residual, A.scalar_type());
  check_per_block("status", status, ScalarType::Char);
  STD_TORCH_CHECK(p > 0 && ridge >= 0, op, ": p must be positive, ridge must not be negative");
}

void inverse_root_eigh_(Tensor A, double p, double ridge, std::optional<double> rank_rtol,
                        std::optional<Tensor> previous, Tensor root, Tensor residual,
                        Tensor status) {
  const char* op = "inverse_root_eigh_";
  check_inverse_root(op, A, p, ridge, previous, root, residual, status);
  STD_TORCH_CHECK(!(rank_rtol.value_or(0) < 0), op, ": rank_rtol must not be negative");
  auto run = [&]<class T>(T) {
    shampoo::inverse_root_eigh<T>(inverse_root<T>(A, p, ridge, previous, root, residual, status),
                                  rank_rtol.value_or(-1), torch_threads());
  };
  A.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

// steps: (count, 5) float32, the coefficients a, b, c, s, t of every step.
void inverse_root_newton_(Tensor A, int64_t p, double ridge, Tensor steps,
                          std::optional<Tensor> previous, Tensor root, Tensor residual,
                          Tensor status) {
  const char* op = "inverse_root_newton_";
  check_inverse_root(op, A, double(p), ridge, previous, root, residual, status);
  check_same_dtype(op, "A", A, ScalarType::Float);
  check_cpu(op, "steps", steps, 2);
  check_same_dtype(op, "steps", steps, ScalarType::Float);
  check_size(op, "steps", steps, 1, 5);
  STD_TORCH_CHECK(steps.is_contiguous() && steps.size(0) >= 1, op,
                  ": steps must be contiguous and hold at least one");
  STD_TORCH_CHECK(p <= 1 << 20, op, ": p must be at most ", 1 << 20, ", got ", p);
  using Step = shampoo::NewtonSchedule::Step;
  shampoo::inverse_root_newton(
      inverse_root<float>(A, double(p), ridge, previous, root, residual, status),
      {reinterpret_cast<const Step*>(steps.const_data_ptr<float>()), steps.size(0), uint32_t(p)},
      torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("eigenvalue_bound", TORCH_BOX(&eigenvalue_bound));
  m.impl("inverse_root_eigh_", TORCH_BOX(&inverse_root_eigh_));
  m.impl("inverse_root_newton_", TORCH_BOX(&inverse_root_newton_));
}
