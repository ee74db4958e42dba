// eigenvalue_bound.cu on threads: eigenvalue_bound float|double blocks n block_stride row_stride
// column_stride < entries > bounds, both raw.
#include "cuda/eigenvalue_bound.cu"

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

template <class T>
int run(char** sizes) {
  int64_t value[5];
  for (int i = 0; i < 5; ++i) value[i] = std::atoll(sizes[i]);
  const auto [blocks, n, block_stride, row_stride, column_stride] = value;
  std::vector<T> entries;
  for (T entry; std::fread(&entry, sizeof(T), 1, stdin) == 1;) entries.push_back(entry);
  std::vector<double> workspace(shampoo::eigenvalue_bound_workspace(blocks, n));
  std::vector<T> bounds(blocks);
  const shampoo::SymmetricStack<T> stack{entries.data(), blocks,     n,
                                         block_stride,   row_stride, column_stride};
  if (shampoo::eigenvalue_bound_cuda(stack, workspace.data(), bounds.data(), nullptr)) return 1;
  return std::fwrite(bounds.data(), sizeof(T), blocks, stdout) != static_cast<size_t>(blocks);
}

int main(int count, char** arguments) {
  if (count != 7) return 2;
  return (arguments[1] == std::string("float") ? run<float> : run<double>)(arguments + 2);
}
