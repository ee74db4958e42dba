// The tensor-core instructions on one warp: mma float < fragments of A (32 lanes, 4), B (32, 2) and
// D (32, 4), float > D, then A rounded to tf32, all raw.
#include "cuda/mma.h"

#include "emulate/program.h"

static void kernel(const float* A, const float* B, float* D, float* rounded) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4], b[2];
  float d[4];
  for (int e = 0; e < 4; ++e) a[e] = shampoo::to_tf32(A[4 * lane + e]);
  for (int e = 0; e < 2; ++e) b[e] = shampoo::to_tf32(B[2 * lane + e]);
  std::memcpy(d, D + 4 * lane, sizeof(d));
  shampoo::mma_16x8x8(d, a, b);
  std::memcpy(D + 4 * lane, d, sizeof(d));
  std::memcpy(rounded + 4 * lane, a, sizeof(a));
}

int main() {
  const auto A = emulate::read<float>(32 * 4), B = emulate::read<float>(32 * 2);
  auto D = emulate::read<float>(32 * 4);
  std::vector<float> rounded(32 * 4);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  if (cudaLaunchKernelEx(&config, kernel, A.data(), B.data(), D.data(), rounded.data())) return 1;
  emulate::write(D);
  emulate::write(rounded);
  return 0;
}
