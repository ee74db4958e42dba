// table.cu on threads: table double count < count numbers > the same from device memory, int64,
// raw.
#include "cuda/table.cu"

#include "emulate/program.h"

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 1) return 2;
  const auto from = emulate::read<int64_t>(values[0]);
  std::vector<int64_t> to(values[0]);
  if (shampoo::write_table_cuda(from.data(), values[0], to.data(), nullptr)) return 1;
  emulate::write(to);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
