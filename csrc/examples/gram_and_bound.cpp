// The launchers of kernels.h without torch: two steps of L <- 0.9 L + 0.1 G G^T for a stack of
// three gradients, then a bound on the largest eigenvalue of every L. From the project's folder:
//
//   isa="-mavx2 -mfma -mf16c"
//   g++ -std=c++20 -O2 $isa -c csrc/cpu/product_avx2.cpp -o "$OUT/avx2.o"
//   isa="$isa -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mprefer-vector-width=512"
//   g++ -std=c++20 -O2 $isa -c csrc/cpu/product_avx512.cpp -o "$OUT/avx512.o"
//   g++ -std=c++20 -O2 -pthread -Icsrc csrc/examples/gram_and_bound.cpp "$OUT"/avx*.o \
//     csrc/cpu/{gram_ema,eigenvalue_bound,product_block,product_isa,product_portable}.cpp \
//     -o "$OUT/gram_and_bound"
#include <cstdio>
#include <thread>
#include <vector>

#include "kernels.h"

// Two threads for every call; a program with a pool of its own hands the work to that.
void run_on_threads(int64_t workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::jthread> threads;  // joined at the end of the scope
  for (int64_t w = 0; w < workers; ++w) threads.emplace_back(body, context, w);
}

int main() {
  const int64_t blocks = 3, m = 40, n = 56;
  std::vector<float> grad(blocks * m * n), stat(blocks * m * m, 0.0f), bound(blocks);
  for (size_t i = 0; i < grad.size(); ++i) grad[i] = float(i * 37 % 101) / 64 - 0.75f;
  const shampoo::Parallel threads = {2, run_on_threads};

  const shampoo::Operand G = {.data = grad.data(),
                              .dtype = shampoo::DType::kFloat32,
                              .block_stride = m * n,
                              .slab_stride = 0,  // one slab per block
                              .row_stride = n,
                              .k_stride = 1};
  const float beta = 0.9f, alpha = 0.1f;
  const shampoo::GramEma update = {.blocks = blocks,
                                   .n = m,
                                   .slabs = 1,
                                   .k = n,
                                   .stat = stat.data(),
                                   .stat_block_stride = m * m,
                                   .stat_row_stride = m,
                                   .left = G,
                                   .grad = G,
                                   .beta = &beta,
                                   .alpha = &alpha,
                                   .beta_stride = 0,
                                   .alpha_stride = 0};
  for (int step = 0; step < 2; ++step) shampoo::gram_ema(update, threads);
  shampoo::eigenvalue_bound<float>({stat.data(), blocks, m, m * m, m, 1}, bound.data(), threads);

  for (float x : bound) std::printf("%.9g\n", x);
  for (float x : stat) std::printf("%.9g\n", x);
}
