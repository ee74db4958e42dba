// The register tile, the loops around it and the mirror, for any vector width and tile size.
// Internal linkage throughout, see product_vector.h.
#pragma once

#include "product_pack.h"

namespace shampoo {
namespace {

// sum + a * b: one number per lane.
struct MultiplyAdd {
  template <class V>
  static SHAMPOO_INLINE V apply(const V& sum, const V& a, const V& b) {
    return sum + a * b;  // contracted to an FMA where there is one
  }
};

// sum + a1 * b1 + a0 * b0: two bf16 numbers per lane, in the order of vdpbf16ps.
struct PairMultiplyAdd {
  template <class V>
  static SHAMPOO_INLINE V apply(const V& sum, const V& a, const V& b) {
    using U = Vector<uint32_t, sizeof(V) / 4>;
    const U ua = bits<U>(a), ub = bits<U>(b);
    const V high = sum + bits<V>(ua & 0xffff0000u) * bits<V>(ub & 0xffff0000u);
    return high + bits<V>(ua << 16) * bits<V>(ub << 16);
  }
};

// One tile of the product, MR rows by kUsed of the NV vectors of a panel, in registers and
// then into out: the whole tile, or (kEdge) what lies inside the matrix and, if kLower, on or below
// the diagonal.
template <class Op, class T, int W, int MR, int NV, int kUsed, bool kEdge, bool kLower>
SHAMPOO_INLINE void update_tile(const typename ProductTile<T>::Update& u, const T* left,
                                const T* right, int64_t i, int64_t j) {
  using V = Vector<T, W>;
  constexpr int kColumns = kUsed * W;
  T* out = u.out + i * u.out_row_stride + j;
  const T* base = u.base + i * u.base_row_stride + j;
  // What the sums are added to comes from further away than the panels, and not in a row.
  const T* ahead = u.beta != T{0} ? base : out;
  const int64_t ahead_stride = u.beta != T{0} ? u.base_row_stride : u.out_row_stride;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) __builtin_prefetch(ahead + r * ahead_stride + v * W, 1);
  }
  V sum[MR][kUsed] = {};
  for (int64_t step = 0; step < u.steps; ++step, left += NV * W, right += NV * W) {
    V g[kUsed];
#pragma GCC unroll 4
    for (int v = 0; v < kUsed; ++v) g[v] = load<V>(right + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const V l = broadcast<T, W>(left[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) sum[r][v] = Op::apply(sum[r][v], l, g[v]);
    }
  }
  const bool read = u.beta != T{0};
  if constexpr (!kEdge) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) {
        const V scaled = u.alpha * sum[r][v];
        const T* from = base + r * u.base_row_stride + v * W;
        store(out + r * u.out_row_stride + v * W, read ? u.beta * load<V>(from) + scaled : scaled);
      }
    }
  } else {
    T tile[MR][kColumns];
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kUsed; ++v) store(&tile[r][v * W], u.alpha * sum[r][v]);
    }
    const int64_t rows = u.rows - i < MR ? u.rows - i : MR;
    for (int64_t r = 0; r < rows; ++r, out += u.out_row_stride, base += u.base_row_stride) {
      const int64_t limit = kLower ? i + r - j + 1 : u.columns - j;
      const int64_t end = limit < kColumns ? limit : kColumns;
      int64_t c = 0;
      for (; c + W <= end; c += W) {
        const V scaled = load<V>(&tile[r][c]);
        store(out + c, read ? u.beta * load<V>(base + c) + scaled : scaled);
      }
      for (; c < end; ++c) out[c] = read ? u.beta * base[c] + tile[r][c] : tile[r][c];
    }
  }
}

// A tile at the edge, with as many vectors of columns as hold something.
template <class Op, class T, int W, int MR, int NV, bool kLower, int kUsed = 1>
SHAMPOO_INLINE void update_edge(const typename ProductTile<T>::Update& u, const T* left,
                                const T* right, int64_t i, int64_t j) {
  if constexpr (kUsed < NV) {
    if (u.columns > j + kUsed * W && !(kLower && i + MR <= j + kUsed * W)) {
      return update_edge<Op, T, W, MR, NV, kLower, kUsed + 1>(u, left, right, i, j);
    }
  }
  update_tile<Op, T, W, MR, NV, kUsed, true, kLower>(u, left, right, i, j);
}

// ProductTile::update_full and update_lower. The panel of right stays in the L1 cache while the
// panels of left pass by.
template <class Op, class T, int W, int MR, int NV, bool kLower>
void update(const typename ProductTile<T>::Update& u, int64_t i0, int64_t i1, int64_t j0,
            int64_t j1) {
  constexpr int NR = NV * W;
  const int64_t size = u.steps * NR;  // of a panel
  for (int64_t j = j0; j < j1 && (!kLower || j < i1); j += NR) {
    const T* right = u.right + j / NR * size;
    // The first tile that holds something of column j.
    const int64_t first = kLower ? j / MR * MR : 0;
    for (int64_t i = i0 > first ? i0 : first; i < i1; i += MR) {
      const T* left = u.left + i / NR * size + i % NR;
      const bool inside = i + MR <= u.rows && (kLower ? i >= j + NR - 1 : j + NR <= u.columns);
      if (inside) {
        update_tile<Op, T, W, MR, NV, NV, false, false>(u, left, right, i, j);
      } else {
        update_edge<Op, T, W, MR, NV, kLower>(u, left, right, i, j);
      }
    }
  }
}

// The W x W block at (i, j), i >= j, to (j, i). A block on the diagonal keeps its lower triangle.
template <class T, int W>
SHAMPOO_INLINE void mirror_block(T* out, int64_t row_stride, int64_t i, int64_t j) {
  Vector<T, W> v[W];
#pragma GCC unroll 16
  for (int r = 0; r < W; ++r) v[r] = load<Vector<T, W>>(out + (i + r) * row_stride + j);
  transpose<T, W>(v);
  if (i > j) {
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) store(out + (j + c) * row_stride + i, v[c]);
  } else {
    using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    const auto lane = ascending<Index>(std::make_integer_sequence<Index, W>());
#pragma GCC unroll 16
    for (int c = 0; c < W; ++c) {
      T* row = out + (i + c) * row_stride + i;
      store(row, lane > Index(c) ? v[c] : load<Vector<T, W>>(row));
    }
  }
}

// ProductTile::mirror.
template <class T, int W>
void mirror(T* out, int64_t row_stride, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  for (int64_t i = i0; i < i1; i += W) {
    for (int64_t j = j0; j < j1 && j < i + W; j += W) {
      if (i + W <= i1 && j + W <= j1 && (j + W <= i || j == i)) {
        mirror_block<T, W>(out, row_stride, i, j);
        continue;
      }
      for (int64_t r = i; r < i + W && r < i1; ++r) {
        for (int64_t c = j; c < j + W && c < j1 && c < r; ++c) {
          out[c * row_stride + r] = out[r * row_stride + c];
        }
      }
    }
  }
}

template <class Op, class T, int W, int MR, int NV>
constexpr ProductTile<T> make_tile(int depth, int block) {
  static_assert(NV * W % MR == 0);
  ProductTile<T> t = {};
  t.panel_rows = NV * W;
  t.depth = depth;
  t.block = block;
  t.update_full = update<Op, T, W, MR, NV, false>;
  t.update_lower = update<Op, T, W, MR, NV, true>;
  t.mirror = mirror<T, W>;
  return t;
}

// The tile whose operands are numbers of any dtype.
template <class T, int W, int MR, int NV>
constexpr ProductTile<T> number_tile(int depth, int block) {
  ProductTile<T> t = make_tile<MultiplyAdd, T, W, MR, NV>(depth, block);
  t.per_step = 1;
  if constexpr (sizeof(T) == 8) {
    t.pack[int(DType::kFloat64)] = pack<T, W, NV * W, Numbers<T, W, double>>;
  } else {
    t.pack[int(DType::kFloat32)] = pack<T, W, NV * W, Numbers<T, W, float>>;
    t.pack[int(DType::kBFloat16)] = pack<T, W, NV * W, Numbers<T, W, BFloat16>>;
    t.pack[int(DType::kFloat16)] = pack<T, W, NV * W, Numbers<T, W, Float16>>;
  }
  return t;
}

// The tile whose operands are bf16, two k at a time.
template <class Op, int W, int MR, int NV>
constexpr ProductTile<float> bf16_pair_tile(int depth, int block) {
  ProductTile<float> t = make_tile<Op, float, W, MR, NV>(depth, block);
  t.per_step = 2;
  t.pack[int(DType::kBFloat16)] = pack<float, W, NV * W, Bf16Pairs<W>>;
  return t;
}

}  // namespace
}  // namespace shampoo
