// The product's tile for any CPU (vectors of 16 bytes: SSE2, NEON), and the AVX-512 tile shapes in
// the same portable code, which lets machines without AVX-512 test all of them but the
// instructions.
#include "product_tile.h"

namespace shampoo {

constinit const ProductIsa product_portable = {
    "portable", number_tile<float, 4, 4, 3>(256, 144),  number_tile<float, 4, 4, 1>(256, 4),
    {},         number_tile<double, 4, 4, 1>(256, 144),
};

constinit const ProductIsa product_avx512_generic = {
    "avx512-generic",
    number_tile<float, 16, 8, 3>(384, 240),
    number_tile<float, 16, 16, 1>(384, 16),
    bf16_pair_tile<PairMultiplyAdd, 16, 8, 3>(384, 240),
    number_tile<double, 8, 8, 3>(256, 216),
};

}  // namespace shampoo
