// What the averages of a piece need beside its memory, on any machine and on a GPU.
#pragma once

#include <cmath>

#include "kernels.h"
#include "numbers.h"

namespace shampoo {

// An average x moves to keep x + add y.
template <class T>
struct MomentFactors {
  T keep1, add1, keep2, add2;
  T eps;  // beside sqrt(v)
  bool moves, nesterov;

  SHAMPOO_BOTH MomentFactors(const MomentRule& rule, T move, T step)
      : moves(move != 0), nesterov(rule.nesterov) {
    add1 = static_cast<T>(1 - rule.beta1);
    keep1 = 1 - add1;
    add2 = rule.sums ? T{1} : static_cast<T>(1 - rule.beta2);
    keep2 = rule.sums ? T{1} : 1 - add2;
    const double seen = step > 1 ? static_cast<double>(step) : 1;
    const double bias = rule.corrected ? -std::expm1(seen * std::log(rule.beta2)) : 1;
    eps = static_cast<T>(rule.eps * std::sqrt(bias));
  }
};

}  // namespace shampoo
