// The float32 FMA rate of this machine, which products are read against.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "product_vector.h"

namespace shampoo {
namespace {

constexpr int kChains = 12;  // independent, so that latency (4 cycles x 2 units) does not matter
constexpr int64_t kSteps = 1 << 18;

// Returns the sum so that nothing can be left out.
template <int W>
SHAMPOO_INLINE float chains(float scale, float shift) {
  using V = Vector<float, W>;
  const V a = broadcast<float, W>(scale), b = broadcast<float, W>(shift);
  V sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = broadcast<float, W>(float(c));  // or they are one
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sums[c] = sums[c] * a + b;
  }
  V total = sums[0];
  for (int c = 1; c < kChains; ++c) total += sums[c];
  return total[0];
}

float chains_portable(float a, float b) {
  return chains<4>(a, b);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) float chains_avx2(float a, float b) {
  return chains<8>(a, b);
}
__attribute__((target("avx512f,fma"))) float chains_avx512(float a, float b) {
  return chains<16>(a, b);
}
#endif

}  // namespace

double peak_gflops(const Parallel& parallel) {
  auto run = chains_portable;
  int width = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    run = chains_avx512, width = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    run = chains_avx2, width = 8;
  }
#endif
  struct Context {
    float (*run)(float, float);
    std::atomic<float> kept{0};
  } context{run};
  double best = 0;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    parallel.run(
        parallel.workers,
        [](void* shared, int64_t worker) {
          auto& c = *static_cast<Context*>(shared);
          c.kept = c.run(0.5f, float(worker));
        },
        &context);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double flops = 2.0 * kChains * width * double(kSteps) * double(parallel.workers);
    best = std::max(best, flops / seconds.count() / 1e9);
  }
  return best;
}

}  // namespace shampoo
