// The 16-bit floats as bits, on any machine and on a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SHAMPOO_BOTH __host__ __device__
#else
#define SHAMPOO_BOTH
#endif

namespace shampoo {

template <class To, class From>
SHAMPOO_BOTH inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;

  SHAMPOO_BOTH operator float() const { return bits_as<float>(uint32_t{bits} << 16); }

  // To nearest, ties to even.
  static SHAMPOO_BOTH BFloat16 of(float x) {
    const auto all = bits_as<uint32_t>(x);
    if (x != x) return {static_cast<uint16_t>(all >> 16 | 0x40)};
    return {static_cast<uint16_t>((all + 0x7fff + (all >> 16 & 1)) >> 16)};
  }
};

struct Float16 {
  uint16_t bits;

  // A power of two moves the exponent's bias, subnormals included.
  SHAMPOO_BOTH operator float() const {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = bits & 0x7fffu;
    const uint32_t widened = rest << 13;
    if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | widened);
    return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(widened) * 0x1p112f));
  }

  // To nearest, ties to even. A subnormal is rounded by adding 0.5, whose last place is theirs.
  static SHAMPOO_BOTH Float16 of(float x) {
    const auto all = bits_as<uint32_t>(x);
    const uint32_t sign = all >> 16 & 0x8000u, size = all & 0x7fffffffu;
    uint32_t half = 0;
    if (size > 0x7f800000) {
      half = 0x7e00 | (size >> 13 & 0x3ff);
    } else if (size >= 0x477ff000) {  // 65520 and more
      half = 0x7c00;
    } else if (size < 0x38800000) {  // below 2^-14
      half = bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000;
    } else {
      half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
  }
};

template <class T, class F>
SHAMPOO_BOTH inline T number(F x) {
  if constexpr (sizeof(T) == 2) {
    return T::of(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace shampoo
