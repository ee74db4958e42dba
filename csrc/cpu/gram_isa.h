// What one instruction set provides to the Gram product. The same templates (gram_pack.h,
// gram_tile.h) are compiled once per set; gram_ema.cpp schedules them and knows no instructions.
#pragma once

#include "../kernels.h"

namespace shampoo {

// A chunk of the sum: columns [0, depth) of each of `slabs` slabs, beginning at `data`.
struct GramChunk {
  const void* data;
  int64_t slab_stride, row_stride, k_stride;  // elements
  int64_t slabs, depth;
};

// Packed rows of a chunk: panels of left_rows or grad_rows rows, each a sequence of steps of one
// value per row (and padding up to left_width). T is the type of the sums; a value holds one
// number, or two bf16 numbers of consecutive k.
template <class T>
struct GramTile {
  int left_rows, grad_rows;  // the register tile: left_rows x grad_rows sums
  int left_width;            // values in a step of left: whole vectors, so that stores are aligned
  int per_step;              // values of k in one step: 1, or 2 for bf16 pairs
  int depth;                 // k of a chunk: a panel of grad_rows stays in the L1 cache
  // Rows of left that stay in the L2 cache; a multiple of left_rows and of grad_rows, so that the
  // pieces of a parallel update are aligned to the vectors of the mirror.
  int left_block;

  // Packs rows [begin, end) of the chunk's n rows; begin is a multiple of the panel's rows, rows
  // from n on are zeros. Indexed by DType; null: not taken.
  using Pack = void (*)(const GramChunk& chunk, int64_t n, int64_t begin, int64_t end, T* panels);
  Pack pack_left[4], pack_grad[4];

  // stat[i, j] <- beta stat[i, j] + alpha (left grad^T)[i, j] for j <= i < n in rows [i0, i1) and
  // columns [j0, j1), which begin at tile boundaries. beta == 0 does not read stat; nothing above
  // the diagonal is read or written, other threads may be mirroring there.
  struct Update {
    const T *left, *grad;  // all panels
    int64_t steps;
    T* stat;
    int64_t stat_row_stride, n;
    T alpha, beta;
  };
  void (*update)(const Update& u, int64_t i0, int64_t i1, int64_t j0, int64_t j1);

  // stat[j, i] <- stat[i, j] for j < i in rows [i0, i1), columns [j0, j1).
  void (*mirror)(T* stat, int64_t row_stride, int64_t i0, int64_t i1, int64_t j0, int64_t j1);
};

struct GramIsa {
  const char* name;
  GramTile<float> f32;
  GramTile<float> bf16_pairs;  // update is null where the set has none
  GramTile<double> f64;
};

extern const GramIsa gram_portable, gram_avx512_generic;
#if defined(__x86_64__)
extern const GramIsa gram_avx2, gram_avx512;
#endif

const GramIsa& current_gram_isa();
// `isa` may hold a pair tile that this CPU cannot run: this says whether it can.
bool runs_bf16_pairs(const GramIsa& isa);

namespace {  // internal: every file that includes this is compiled for another instruction set

// Steps of a packed chunk: pairs do not reach over the end of a slab.
inline int64_t chunk_steps(int64_t slabs, int64_t depth, int per_step) {
  return slabs * ((depth + per_step - 1) / per_step);
}

}  // namespace
}  // namespace shampoo
