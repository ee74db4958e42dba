// The product's tile for AVX2 and FMA: 12 of 16 registers hold sums.
#if defined(__x86_64__) && defined(__AVX2__) && defined(__FMA__)

#include "product_tile.h"

namespace shampoo {

constinit const ProductIsa product_avx2 = {
    "avx2", number_tile<float, 8, 4, 3>(256, 144),  number_tile<float, 8, 8, 1>(256, 8),
    {},     number_tile<double, 4, 4, 3>(256, 144),
};

}  // namespace shampoo

#endif
