// The ops on stacks of square matrices on a CPU and on a GPU: their checks, and the problems that
// the launchers take. Which device it is the dispatcher has seen to: that of any tensor.
#pragma once

#include <initializer_list>

#include "bindings.h"

namespace shampoo {

// (B, n, n) float32 or float64.
inline void check_square_floats(const char* op, const Tensor& A) {
  STD_TORCH_CHECK(A.dim() == 3, op, ": A must have 3 dimensions, got ", A.dim());
  check_size(op, "A", A, 2, A.size(1));
  const ScalarType dtype = A.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": A must be float32 or float64");
}

// f(T{}) for the dtype of A, float32 or float64.
template <class F>
void by_dtype(const Tensor& A, const F& f) {
  A.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& A,
                       ScalarType dtype, std::initializer_list<int64_t> shape, bool contiguous) {
  const bool together = t.is_cpu() == A.is_cpu() && t.get_device_index() == A.get_device_index();
  STD_TORCH_CHECK(together, op, ": ", name, " must be on the device of A");
  check_same_dtype(op, name, t, dtype);
  STD_TORCH_CHECK(t.dim() == int64_t(shape.size()), op, ": ", name, " must have ", shape.size(),
                  " dimensions, got ", t.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) check_size(op, name, t, dim++, size);
  STD_TORCH_CHECK(!contiguous || t.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_inverse_root(const char* op, const Tensor& A, double p, double ridge,
                               const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& previous, const Tensor& root,
                               const Tensor& residual, const Tensor& status) {
  check_square_floats(op, A);
  const int64_t blocks = A.size(0), n = A.size(1);
  const ScalarType dtype = A.scalar_type();
  check_like(op, "root", root, A, dtype, {blocks, n, n}, false);
  STD_TORCH_CHECK(n <= 1 || (root.stride(2) == 1 && root.stride(1) == n), op,
                  ": the matrices of root must be contiguous");
  if (scale) check_like(op, "scale", *scale, A, dtype, {blocks}, false);
  if (previous) check_like(op, "previous", *previous, A, dtype, {blocks, n, n}, false);
  check_like(op, "residual", residual, A, dtype, {blocks}, true);
  check_like(op, "status", status, A, ScalarType::Char, {blocks}, true);
  STD_TORCH_CHECK(p > 0 && ridge >= 0, op, ": p must be positive, ridge must not be negative");
}

// The coefficients of Newton's steps, on the CPU everywhere, and p, which is an integer there.
inline void check_steps(const char* op, const Tensor& steps, ScalarType dtype, int64_t columns,
                        int64_t p) {
  check_cpu(op, "steps", steps, 2);
  check_same_dtype(op, "steps", steps, dtype);
  check_size(op, "steps", steps, 1, columns);
  STD_TORCH_CHECK(steps.is_contiguous() && steps.size(0) >= 1, op,
                  ": steps must be contiguous and hold at least one");
  STD_TORCH_CHECK(p <= 1 << 20, op, ": p must be at most ", 1 << 20, ", got ", p);
}

template <class T>
InverseRoot<T> inverse_root_of(const Tensor& A, double p, double ridge,
                               const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& previous, const Tensor& root,
                               const Tensor& residual, const Tensor& status) {
  auto stride = [&](int dim) { return previous ? previous->stride(dim) : 0; };
  return {symmetric_stack<T>(A),
          scale ? scale->const_data_ptr<T>() : nullptr,
          scale ? scale->stride(0) : 0,
          p,
          ridge,
          previous ? previous->const_data_ptr<T>() : nullptr,
          stride(0),
          stride(1),
          stride(2),
          root.mutable_data_ptr<T>(),
          root.stride(0),
          residual.mutable_data_ptr<T>(),
          status.mutable_data_ptr<int8_t>()};
}

inline void check_power_iteration(const char* op, const Tensor& A, int64_t steps, int64_t vectors) {
  check_square_floats(op, A);
  STD_TORCH_CHECK(A.size(1) >= 1 && steps >= 1 && steps <= 1 << 20 && vectors >= 1, op,
                  ": n, steps and vectors must be at least 1, steps at most ", 1 << 20);
}

inline void check_orthogonal_iteration(const char* op, const Tensor& A, const Tensor& Q,
                                       const Tensor& eigenvalues, const Tensor& basis) {
  check_square_floats(op, A);
  const int64_t blocks = A.size(0), n = A.size(1);
  const ScalarType dtype = A.scalar_type();
  check_like(op, "Q", Q, A, dtype, {blocks, n, n}, false);
  check_like(op, "eigenvalues", eigenvalues, A, dtype, {blocks, n}, true);
  check_like(op, "basis", basis, A, dtype, {blocks, n, n}, true);
}

template <class T>
OrthogonalIteration<T> orthogonal_iteration_of(const Tensor& A, const Tensor& Q, double lift,
                                               int64_t steps, const Tensor& eigenvalues,
                                               const Tensor& basis) {
  auto matrices = [](const Tensor& t) {
    return MatrixStack<T>{t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
  };
  return {A.size(0),
          A.size(1),
          matrices(A),
          matrices(Q),
          lift,
          steps,
          eigenvalues.mutable_data_ptr<T>(),
          basis.mutable_data_ptr<T>()};
}

}  // namespace shampoo
