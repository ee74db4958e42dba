// The twins of csrc/cuda/mma.h. Products of tf32 numbers are exact in float; they are summed in
// double and rounded once, where tensor cores may truncate and align to the largest.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace shampoo {

inline uint32_t to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return bits & 0xffffe000u;
  return (bits + 0x1000u) & 0xffffe000u;
}

// Every lane shows its operands; each then gathers the rows and columns of what it holds of D.
inline void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& exchange = emulate::warp().exchange;
  const unsigned lane = threadIdx.x % emulate::kWarpSize;
  std::memcpy(exchange[lane], a, sizeof(a));
  std::memcpy(exchange[lane] + sizeof(a), b, sizeof(b));
  __syncwarp();
  // tf32 reads the upper 19 bits of a register.
  auto held = [&](unsigned of, unsigned number) {
    uint32_t bits;
    std::memcpy(&bits, exchange[of] + 4 * number, sizeof(bits));
    return double(std::bit_cast<float>(bits & 0xffffe000u));
  };
  auto A = [&](unsigned row, unsigned k) { return held(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2); };
  auto B = [&](unsigned k, unsigned column) { return held(column * 4 + k % 4, 4 + k / 4); };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = d[e];
    for (unsigned k = 0; k < 8; ++k) sum += A(row, k) * B(k, column);
    d[e] = float(sum);
  }
  __syncwarp();
}

}  // namespace shampoo
