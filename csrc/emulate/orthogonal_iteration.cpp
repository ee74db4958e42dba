// orthogonal_iteration.cu on threads: orthogonal_iteration float|double blocks n steps < lift
// (double), A, Q (blocks, n, n) > eigenvalues, basis, all raw.
#include "cuda/orthogonal_iteration.cu"

#include "emulate/program.h"

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 3) return 2;
  const int64_t blocks = values[0], n = values[1];
  const double lift = emulate::read<double>(1)[0];
  const auto A = emulate::read<T>(blocks * n * n), Q = emulate::read<T>(blocks * n * n);
  std::vector<T> eigenvalues(blocks * n), basis(blocks * n * n);
  const shampoo::OrthogonalIteration<T> problem{
      blocks, n,         {A.data(), n * n, n, 1}, {Q.data(), n * n, n, 1},
      lift,   values[2], eigenvalues.data(),      basis.data()};
  if (shampoo::orthogonal_iteration_cuda(problem, nullptr)) return 1;
  emulate::write(eigenvalues);
  emulate::write(basis);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
