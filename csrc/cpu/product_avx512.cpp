// The product's tile for AVX-512: 24 of 32 registers hold sums. bf16 operands go two k at a time.
#if defined(__x86_64__) && defined(__AVX512F__) && defined(__AVX512BF16__)

#include <immintrin.h>

#include "product_tile.h"

namespace shampoo {
namespace {

// PairMultiplyAdd in one instruction.
struct Dpbf16 {
  static SHAMPOO_INLINE Vector<float, 16> apply(const Vector<float, 16>& sum,
                                                const Vector<float, 16>& a,
                                                const Vector<float, 16>& b) {
    return _mm512_dpbf16_ps(sum, bits<__m512bh>(a), bits<__m512bh>(b));
  }
};

}  // namespace

constinit const ProductIsa product_avx512 = {
    "avx512",
    number_tile<float, 16, 8, 3>(384, 240),
    number_tile<float, 16, 16, 1>(384, 16),
    // A longer chunk is not faster, and its sums are 4 times as wrong at 768 (k from 512): squares
    // of bf16 numbers are 0 or 1 modulo 4 units, so that a long sum rounds them down, not at
    // random.
    bf16_pair_tile<Dpbf16, 16, 8, 3>(384, 240),
    number_tile<double, 8, 8, 3>(256, 216),
};

}  // namespace shampoo

#endif
