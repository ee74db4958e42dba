// Packing: rows of any dtype and strides become panels that the register tile reads in order.
// Internal linkage throughout, see product_vector.h.
#pragma once

#include "product_vector.h"

namespace shampoo {
namespace {

// How W values of a panel come out of memory. kPerStep consecutive k make one value.
template <class T, int W, class S>
struct Numbers {
  using Source = S;
  static constexpr int kPerStep = 1;
  static SHAMPOO_INLINE Vector<T, W> along_k(const S* x) { return Convert<T, W, S>::from(x); }
  static SHAMPOO_INLINE Vector<T, W> along_n(const S* x, int64_t) {
    return Convert<T, W, S>::from(x);
  }
  static SHAMPOO_INLINE T one(const S* x, int64_t, int64_t) {
    if constexpr (sizeof(S) == sizeof(T)) {
      return *x;
    } else if constexpr (std::is_same_v<S, BFloat16>) {
      return bits<float>(uint32_t{x->bits} << 16);
    } else {
      S lanes[W] = {*x};
      return Convert<T, W, S>::from(lanes)[0];
    }
  }
};

// Two bf16 numbers of consecutive k, the first in the low half, as the bits of a float.
template <int W>
struct Bf16Pairs {
  using Source = BFloat16;
  static constexpr int kPerStep = 2;
  static SHAMPOO_INLINE Vector<float, W> along_k(const BFloat16* x) {
    return load<Vector<float, W>>(x);
  }
  static SHAMPOO_INLINE Vector<float, W> along_n(const BFloat16* x, int64_t k_stride) {
    using U = Vector<uint32_t, W>;
    const U low = __builtin_convertvector(load<Vector<uint16_t, W>>(x), U);
    const U high = __builtin_convertvector(load<Vector<uint16_t, W>>(x + k_stride), U);
    return bits<Vector<float, W>>(low | high << 16);
  }
  static SHAMPOO_INLINE float one(const BFloat16* x, int64_t k_stride, int64_t k_left) {
    const uint32_t high = k_left > 1 ? x[k_stride].bits : 0;
    return bits<float>(uint32_t{x->bits} | high << 16);
  }
};

// A panel: steps of R values, one for each row, R a multiple of W.

// Steps [begin, end), one value at a time; rows beyond `rows` become 0.
template <class T, int W, int R, class Reader>
void pack_values(const typename Reader::Source* source, const ProductChunk& chunk, int64_t rows,
                 int64_t begin, int64_t end, T* panel) {
  for (int64_t step = begin; step < end; ++step) {
    const int64_t k = step * Reader::kPerStep;
    const auto* x = source + k * chunk.k_stride;
    T* to = panel + step * R;
    for (int r = 0; r < R; r += W) store(to + r, Vector<T, W>{});
    for (int64_t r = 0; r < rows; ++r, x += chunk.row_stride) {
      to[r] = Reader::one(x, chunk.k_stride, chunk.depth - k);
    }
  }
}

// k is contiguous: W rows by W steps at a time, transposed in registers. Returns where it stopped.
template <class T, int W, int R, class Reader, bool kFull>
int64_t pack_along_k(const typename Reader::Source* source, const ProductChunk& chunk, int64_t rows,
                     int64_t begin, int64_t end, T* panel) {
  for (; (begin + W) * Reader::kPerStep <= chunk.depth && begin + W <= end; begin += W) {
#pragma GCC unroll 2
    for (int group = 0; group < R; group += W) {
      Vector<T, W> v[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        v[r] = Vector<T, W>{};
        if (kFull || group + r < rows) {
          v[r] =
              Reader::along_k(source + (group + r) * chunk.row_stride + begin * Reader::kPerStep);
        }
      }
      transpose<T, W>(v);
#pragma GCC unroll 16
      for (int s = 0; s < W; ++s) store(panel + (begin + s) * R + group, v[s]);
    }
  }
  return begin;
}

// n is contiguous: a copy by whole vectors. Where there are fewer than R rows they also read
// what follows in memory, but never beyond the last element of the chunk; whatever comes into the
// lanes of rows that do not exist, no sum of them is stored. Returns where it stopped.
template <class T, int W, int R, class Reader>
int64_t pack_along_n(const typename Reader::Source* source, const ProductChunk& chunk, int64_t rows,
                     int64_t begin, int64_t end, T* panel) {
  const int64_t beyond = rows < R ? R - rows : 0;
  for (; (begin + 1) * Reader::kPerStep <= chunk.depth && begin < end; ++begin) {
    if (beyond > (chunk.depth - (begin + 1) * Reader::kPerStep) * chunk.k_stride) break;
    const auto* x = source + begin * Reader::kPerStep * chunk.k_stride;
#pragma GCC unroll 2
    for (int group = 0; group < R; group += W) {
      store(panel + begin * R + group, Reader::along_n(x + group, chunk.k_stride));
    }
  }
  return begin;
}

// ProductTile::Pack. Where n is contiguous neighbouring panels share cache lines of the source, so
// all panels take a few steps in turn; along k long runs are better.
template <class T, int W, int R, class Reader>
void pack(const ProductChunk& chunk, int64_t n, int64_t row_begin, int64_t row_end, T* panels) {
  const int64_t slab_steps = chunk_steps(1, chunk.depth, Reader::kPerStep);
  const int64_t panel_size = chunk.slabs * slab_steps * R;
  const int64_t run = chunk.k_stride == 1 ? slab_steps : 4;
  for (int64_t slab = 0; slab < chunk.slabs; ++slab) {
    const auto* slab_source =
        static_cast<const typename Reader::Source*>(chunk.data) + slab * chunk.slab_stride;
    for (int64_t begin = 0; begin < slab_steps; begin += run) {
      const int64_t end = begin + run < slab_steps ? begin + run : slab_steps;
      for (int64_t row = row_begin; row < row_end; row += R) {
        const int64_t rows = n - row < R ? n - row : R;
        const auto* source = slab_source + row * chunk.row_stride;
        T* panel = panels + row / R * panel_size + slab * slab_steps * R;
        int64_t done = begin;
        if (chunk.k_stride == 1) {
          done = rows == R
                     ? pack_along_k<T, W, R, Reader, true>(source, chunk, rows, begin, end, panel)
                     : pack_along_k<T, W, R, Reader, false>(source, chunk, rows, begin, end, panel);
        } else if (chunk.row_stride == 1) {
          done = pack_along_n<T, W, R, Reader>(source, chunk, n - row, begin, end, panel);
        }
        pack_values<T, W, R, Reader>(source, chunk, rows, done, end, panel);
      }
    }
  }
}

}  // namespace
}  // namespace shampoo
