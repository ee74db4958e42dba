// inverse_root.cu on threads: inverse_root float|double blocks n p tensor_cores steps keeps
// in_place < ridge (double), steps (rows of six), A (blocks, n, n), and if `keeps` previous
// (blocks, n, n), which with `in_place` the root is written over > root, residual, status, all raw.
// inverse_root float|double n tensor_cores > the bytes of shared memory that n takes, int64.
#include "cuda/inverse_root.cu"

#include "emulate/program.h"

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() == 2) {
    emulate::write(std::vector{shampoo::inverse_root_small_bytes<T>(values[0], values[1] != 0)});
    return 0;
  }
  if (values.size() != 7) return 2;
  const int64_t blocks = values[0], n = values[1], p = values[2], count = values[4];
  const bool keeps = values[5] != 0, in_place = values[6] != 0;
  const double ridge = emulate::read<double>(1)[0];
  const auto coefficients = emulate::read<T>(6 * count);
  const auto A = emulate::read<T>(blocks * n * n);
  auto previous = emulate::read<T>(keeps ? blocks * n * n : 0);
  std::vector<T> fresh(in_place ? 0 : blocks * n * n), residual(blocks);
  std::vector<int8_t> status(blocks);
  std::vector<T>& root = in_place ? previous : fresh;

  shampoo::RootSteps<T> steps{};
  steps.count = int(count);
  steps.p = uint32_t(p);
  for (int i = 0; i < count; ++i) {
    const T* c = &coefficients[6 * i];
    steps.step[i] = {c[0], c[1], c[2], c[3], c[4], c[5]};
  }
  const shampoo::InverseRoot<T> problem{{A.data(), blocks, n, n * n, n, 1},
                                        nullptr,
                                        0,
                                        double(p),
                                        ridge,
                                        keeps ? previous.data() : nullptr,
                                        n * n,
                                        n,
                                        1,
                                        root.data(),
                                        n * n,
                                        residual.data(),
                                        status.data()};
  if (shampoo::inverse_root_small_cuda(problem, steps, values[3] != 0, nullptr)) return 1;
  emulate::write(root);
  emulate::write(residual);
  emulate::write(status);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
