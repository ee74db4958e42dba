// eigenvalue_bound.cu on threads: eigenvalue_bound float|double blocks n block_stride row_stride
// column_stride < entries > bounds, both raw.
#include "cuda/eigenvalue_bound.cu"

#include "emulate/program.h"

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 5) return 2;
  const int64_t blocks = values[0], n = values[1];
  const std::vector<T> entries = emulate::read_all<T>();
  std::vector<double> workspace(shampoo::eigenvalue_bound_workspace(blocks, n));
  std::vector<T> bounds(blocks);
  const shampoo::SymmetricStack<T> stack{entries.data(), blocks,    n,
                                         values[2],      values[3], values[4]};
  if (shampoo::eigenvalue_bound_cuda(stack, workspace.data(), bounds.data(), nullptr)) return 1;
  emulate::write(bounds);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
