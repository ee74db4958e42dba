// Vectors of any width in GCC's and Clang's vector extensions, with the loads that convert.
//
// Everything here has internal linkage: the header is compiled several times with different
// instruction sets, and if the copies were merged (as those of inline functions and templates with
// external linkage are), a CPU could be handed code that it cannot run.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "product_isa.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors cross no ABI boundary: all is inlined
#endif

#define SHAMPOO_INLINE inline __attribute__((always_inline))

namespace shampoo {
namespace {

template <class T, int W>
struct VectorOf {
  typedef T type __attribute__((vector_size(W * sizeof(T))));
};
template <class T, int W>
using Vector = typename VectorOf<T, W>::type;

template <class V, class T>
SHAMPOO_INLINE V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class T>
SHAMPOO_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}

template <class V, class T, int... L>
SHAMPOO_INLINE V broadcast(T x, std::integer_sequence<int, L...>) {
  return V{((void)L, x)...};
}
template <class T, int W>
SHAMPOO_INLINE Vector<T, W> broadcast(T x) {
  return broadcast<Vector<T, W>>(x, std::make_integer_sequence<int, W>());
}

template <class T, T... L>
SHAMPOO_INLINE Vector<T, sizeof...(L)> ascending(std::integer_sequence<T, L...>) {
  return Vector<T, sizeof...(L)>{L...};
}

template <class To, class From>
SHAMPOO_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V, int... L, class Pick>
SHAMPOO_INLINE V shuffle(const V& a, const V& b, std::integer_sequence<int, L...>,
                         [[maybe_unused]] Pick pick) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick{}(L)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vector<Index, sizeof...(L)>{pick(L)...});
#endif
}

// v[r][c] <- v[c][r], by exchanging the off-diagonal S x S blocks of every 2S x 2S block. Within 16
// bytes of floats the two smallest exchanges are made of interleavings instead, which are single
// instructions (unpcklps, unpckhps) on x86 and ARM.
template <class T, int W, int S = 1>
SHAMPOO_INLINE void transpose(Vector<T, W> (&v)[W]) {
  if constexpr (S < W) {
    constexpr auto lanes = std::make_integer_sequence<int, W>();
    constexpr bool kInterleave = S == 1 && sizeof(T) == 4 && W >= 4;
#pragma GCC unroll 16
    for (int r = 0; r < W; ++r) {
      if (r & S) continue;
      const Vector<T, W> a = v[r], b = v[r + S];
      if constexpr (kInterleave) {
        v[r] = shuffle(a, b, lanes, [](int l) { return (l & ~3) + (l >> 1 & 1) + (l & 1) * W; });
        v[r + 1] =
            shuffle(a, b, lanes, [](int l) { return (l & ~3) + (l >> 1 & 1) + (l & 1) * W + 2; });
      } else {
        v[r] = shuffle(a, b, lanes, [](int l) { return l & S ? W + l - S : l; });
        v[r + S] = shuffle(a, b, lanes, [](int l) { return l & S ? W + l : l + S; });
      }
    }
    transpose<T, W, 2 * S>(v);
    if constexpr (kInterleave) {
#pragma GCC unroll 4
      for (int r = 0; r < W; r += 4) {
        const Vector<T, W> second = v[r + 1];
        v[r + 1] = v[r + 2];
        v[r + 2] = second;
      }
    }
  }
}

// 16-bit floats are handled as their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// W numbers of type S as T.
template <class T, int W, class S>
struct Convert;

template <class T, int W>
struct Convert<T, W, T> {
  static SHAMPOO_INLINE Vector<T, W> from(const T* x) { return load<Vector<T, W>>(x); }
};

template <int W>
struct Convert<float, W, BFloat16> {
  static SHAMPOO_INLINE Vector<float, W> from(const BFloat16* x) {
    const auto half = load<Vector<uint16_t, W>>(x);
    return bits<Vector<float, W>>(__builtin_convertvector(half, Vector<uint32_t, W>) << 16);
  }
};

template <int W>
struct Convert<float, W, Float16> {
  // One instruction where there is one: packing fp16 with it is twice as fast. Else integers and
  // one exact subtraction. Either way a thread that flushes subnormals keeps those of fp16, which
  // float32 holds as normal numbers.
  static SHAMPOO_INLINE Vector<float, W> from(const Float16* x) {
#if defined(__F16C__)
    if constexpr (W == 8) return _mm256_cvtph_ps(load<__m128i>(x));
#endif
#if defined(__AVX512F__)
    // The masked form, because the plain one warns in GCC 12 of an undefined source.
    if constexpr (W == 16) return _mm512_maskz_cvtph_ps(0xffff, load<__m256i>(x));
#endif
    using F = Vector<float, W>;
    using U = Vector<uint32_t, W>;
    const U half = __builtin_convertvector(load<Vector<uint16_t, W>>(x), U);
    const U sign = (half & 0x8000u) << 16;
    const U magnitude = (half & 0x7fffu) << 13;
    const U exponent = magnitude & 0x0f800000u;
    const U normal = magnitude + ((127u - 15u) << 23);
    const U special = magnitude | 0x7f800000u;
    // 2^-14 (1 + fraction) - 2^-14
    const U subnormal = bits<U>(bits<F>(magnitude + (113u << 23)) - bits<F>(U{} + (113u << 23)));
    const U is_special = bits<U>(exponent == 0x0f800000u);
    const U is_subnormal = bits<U>(exponent == 0u);
    return bits<F>(sign | (special & is_special) | (subnormal & is_subnormal) |
                   (normal & ~(is_special | is_subnormal)));
  }
};

}  // namespace
}  // namespace shampoo
