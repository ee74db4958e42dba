// Tensor-core instructions as functions of a warp: inline PTX, or in emulation what the PTX manual
// says they do (emulate/mma.h).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(SHAMPOO_EMULATED)
#include "emulate/mma.h"
#else

namespace shampoo {

// x to the nearest tf32 number (10 bits after the point), ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// D (16 x 8) <- A (16 x 8) B (8 x 8) + D, of tf32 numbers, summed in float32. With g = lane / 4 and
// t = lane % 4 a lane holds (row, column) of
//   A: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   B: (t, g), (t + 4, g)
//   D: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// (PTX manual, "Matrix Fragments for mma.m16n8k8", .tf32.) All lanes of a warp call it.
__device__ __forceinline__ void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4],
                                           const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace shampoo

#endif
