// From a dtype in a table to a type, on any machine and on a GPU.
#pragma once

#include "kernels.h"
#include "numbers.h"

namespace shampoo {

// f(T{}) with the type that `dtype` stands for.
template <class F>
SHAMPOO_BOTH inline void with_type(int64_t dtype, const F& f) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat64:
      return f(double{});
  }
}

// The largest sum of squares of numbers of `dtype` that counts as a number.
SHAMPOO_BOTH inline double most_squares(int64_t dtype) {
  return static_cast<DType>(dtype) == DType::kFloat64 ? 0x1.fffffffffffffp1023 : 0x1.fffffep127;
}

}  // namespace shampoo
