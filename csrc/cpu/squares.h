// Sums of squares in float64.
#pragma once

#include <cstdint>

#include "wide.h"

namespace shampoo {

// The sum of of(e)^2 over e < count, in lanes that a compiler makes vectors of.
template <class F>
SHAMPOO_INLINED double squares(int64_t count, const F& of) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= count; e += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = of(e + lane);
      lanes[lane] += x * x;
    }
  }
  for (; e < count; ++e) lanes[0] += of(e) * of(e);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class T>
inline double squares(const T* x, int64_t count) {
  return squares(count, [&](int64_t e) { return double(x[e]); });
}
// The same bits in any vectors, because these squares are exact.
double squares(const float* x, int64_t count);

}  // namespace shampoo
