// The sum of squares of float32 numbers, for the vectors that there are.
#include "squares.h"

namespace shampoo {

SHAMPOO_WIDE double squares(const float* x, int64_t count) {
  return squares(count, [&](int64_t e) { return double(x[e]); });
}

}  // namespace shampoo
