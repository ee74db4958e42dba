// The product of one block, shared by gram_ema.cpp (float32) and inverse_root.cpp (the rebuild).
#pragma once

#include "gram_isa.h"

namespace shampoo {

// stat <- beta stat + alpha sum_s left[s] grad[s]^T for one block, lower triangle and mirror.
template <class T>
struct GramBlock {
  T* stat;
  const void *left, *grad;
  T beta, alpha;
};

// What the blocks of a stack have in common, worked out once.
//
// k goes in chunks: several whole slabs each, or equal parts of one slab. For each chunk the rows
// of left and of grad are packed into panels, then every tile adds its part to stat. The sum of an
// element is thus ordered by (slabs, k) alone: the chunks in turn, k ascending inside. Which thread
// computes a tile, and when, changes nothing.
template <class T>
class GramPlan {
 public:
  // Strides and dtypes as in GramOperand, whose data is not looked at. T = double takes float64
  // operands, T = float the others.
  GramPlan(const GramIsa& isa, int64_t n, int64_t slabs, int64_t k, int64_t stat_row_stride,
           const GramOperand& left, const GramOperand& grad);

  // On the calling thread.
  void run(const GramBlock<T>& block) const;
  // The same bits, with the tiles of the block shared out over the threads.
  void run_parallel(const GramBlock<T>& block, const Parallel& parallel) const;

 private:
  GramChunk chunk(const GramOperand& operand, const void* data, int64_t index) const;
  bool scale_only(const GramBlock<T>& block) const;
  void pack(const GramBlock<T>& block, int64_t chunk, int64_t begin, int64_t end, T* panels) const;
  void update(const GramBlock<T>& block, int64_t chunk, int64_t i0, int64_t i1, int64_t j0,
              int64_t j1, const T* panels) const;

  const GramTile<T>& tile_;
  int64_t n_, slabs_, k_, stat_row_stride_;
  GramOperand left_, grad_;
  int64_t slabs_each_ = 1, depth_each_ = 1, parts_ = 1;  // of a chunk; parts of one slab
  int64_t chunks_ = 0;
  int64_t left_size_, panels_size_;  // values of packed left, of packed left and grad
};

}  // namespace shampoo
