// What one instruction set provides to the product. The same templates (product_pack.h,
// product_tile.h) are compiled once per set; product_block.cpp schedules them and knows no
// instructions.
#pragma once

#include "../kernels.h"

namespace shampoo {

// A chunk of the sum: columns [0, depth) of each of `slabs` slabs, beginning at `data`.
struct ProductChunk {
  const void* data;
  int64_t slab_stride, row_stride, k_stride;  // elements
  int64_t slabs, depth;
};

// Packed rows of a chunk: panels of panel_rows rows, each a sequence of steps of one value per row.
// T is the type of the sums; a value holds one number, or two bf16 numbers of consecutive k. Left
// and right have the same panels, of which a register tile takes all columns of a right one and
// some rows of a left one, so that a matrix which is both is packed once.
template <class T>
struct ProductTile {
  int panel_rows;
  int per_step;  // values of k in one step: 1, or 2 for bf16 pairs
  int depth;     // k of a chunk: a panel stays in the L1 cache or comes from the L2 as fast
  int block;     // rows of left that stay in the L2 cache; a multiple of panel_rows

  // Packs rows [begin, end) of the chunk's n rows; begin is a multiple of the panel's rows, rows
  // from n on are anything. Indexed by DType; null: not taken.
  using Pack = void (*)(const ProductChunk& chunk, int64_t n, int64_t begin, int64_t end,
                        T* panels);
  Pack pack[4];

  // out[i, j] <- beta base[i, j] + alpha (left right^T)[i, j] in rows [i0, i1) and columns
  // [j0, j1), which begin at tile boundaries. beta == 0 does not read base, which may be out.
  struct Update {
    const T *left, *right;  // all panels
    int64_t steps;
    T* out;
    const T* base;
    int64_t out_row_stride, base_row_stride, rows, columns;
    T alpha, beta;
  };
  using UpdateFunction = void (*)(const Update& u, int64_t i0, int64_t i1, int64_t j0, int64_t j1);
  UpdateFunction update_full;
  // Of a symmetric product, j <= i only; nothing above the diagonal is read or written, other
  // threads may be mirroring there.
  UpdateFunction update_lower;

  // out[j, i] <- out[i, j] for j < i in rows [i0, i1), columns [j0, j1).
  void (*mirror)(T* out, int64_t row_stride, int64_t i0, int64_t i1, int64_t j0, int64_t j1);
};

struct ProductIsa {
  const char* name;
  ProductTile<float> f32;
  ProductTile<float> f32_small;   // one vector of columns, for symmetric matrices with no more
  ProductTile<float> bf16_pairs;  // update_full is null where the set has none
  ProductTile<double> f64;
};

extern const ProductIsa product_portable, product_avx512_generic;
#if defined(__x86_64__)
extern const ProductIsa product_avx2, product_avx512;
#endif

const ProductIsa& current_product_isa();
// `isa` may hold a pair tile that this CPU cannot run: this says whether it can.
bool runs_bf16_pairs(const ProductIsa& isa);

namespace {  // internal: every file that includes this is compiled for another instruction set

// Steps of a packed chunk: pairs do not reach over the end of a slab.
inline int64_t chunk_steps(int64_t slabs, int64_t depth, int per_step) {
  return slabs * ((depth + per_step - 1) / per_step);
}

}  // namespace
}  // namespace shampoo
