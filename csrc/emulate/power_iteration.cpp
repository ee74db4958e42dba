// power_iteration.cu on threads: power_iteration float|double blocks n row_stride column_stride
// steps vectors < entries > estimates, both raw.
#include "cuda/power_iteration.cu"

#include "emulate/program.h"

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 6) return 2;
  const int64_t blocks = values[0], n = values[1];
  const auto A = emulate::read<T>(blocks * n * n);
  std::vector<T> estimate(blocks);
  const shampoo::SymmetricStack<T> stack{A.data(), blocks, n, n * n, values[2], values[3]};
  const auto error =
      shampoo::power_iteration_cuda(stack, int(values[4]), values[5], estimate.data(), nullptr);
  if (error) return 1;
  emulate::write(estimate);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
