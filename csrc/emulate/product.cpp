// The products of matrices in shared memory on threads: product float|double form n in_place < a,
// b, c (of the dtype), A (n, n) > a I + b A + c A A, then max |D - I| and the sum of its squares,
// by each thread (float64 pairs), all raw. form: 4 or 8, the tile of multiply-adds, or 0, tensor
// cores.
#include "cuda/product_ffma.h"
#include "cuda/product_mma.h"

#include "emulate/program.h"

using shampoo::dynamic_shared;

template <class T, class Product>
void kernel(const T* numbers, bool in_place, T* result, double* distances) {
  const int n = int(numbers[3]), leading = Product::leading(n);
  const int size = Product::rows(n) * leading;
  T *A = dynamic_shared<T>(), *D = in_place ? A : A + size;
  for (int at = threadIdx.x; at < (in_place ? 1 : 2) * size; at += blockDim.x) A[at] = 0;
  __syncthreads();
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    A[at / n * leading + at % n] = numbers[4 + at];
  }
  __syncthreads();
  const auto found = Product(n)(A, A, D, {numbers[0], numbers[1], numbers[2], A});
  for (int at = threadIdx.x; at < n * n; at += blockDim.x) {
    result[at] = D[at / n * leading + at % n];
  }
  distances[2 * threadIdx.x] = double(found.largest);
  distances[2 * threadIdx.x + 1] = double(found.squares);
}

template <class T, class Product>
int run_with(int n, bool in_place) {
  auto numbers = emulate::read<T>(3);
  numbers.push_back(T(n));
  for (const T x : emulate::read<T>(n * n)) numbers.push_back(x);
  const int threads = Product::threads(n);
  std::vector<T> result(n * n);
  std::vector<double> distances(2 * threads);
  const int64_t bytes =
      int64_t(in_place ? 1 : 2) * Product::rows(n) * Product::leading(n) * int64_t(sizeof(T));
  if (threads > Product::kMostThreads ||
      shampoo::launch(kernel<T, Product>, 1, threads, bytes, nullptr, numbers.data(), in_place,
                      result.data(), distances.data())) {
    return 1;
  }
  emulate::write(result);
  emulate::write(distances);
  return 0;
}

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 3) return 2;
  const int n = int(values[1]);
  const bool in_place = values[2] != 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (values[0] == 0) return run_with<T, shampoo::MmaProduct>(n, in_place);
    if (values[0] == 8) return run_with<T, shampoo::FfmaProduct<T, 8>>(n, in_place);
  }
  return run_with<T, shampoo::FfmaProduct<T, 4>>(n, in_place);
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
