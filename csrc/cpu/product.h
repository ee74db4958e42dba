// The product of one block and of a stack of blocks, shared by everything that multiplies.
#pragma once

#include "parallel.h"
#include "product_isa.h"

namespace shampoo {

// out <- identity I + beta base + alpha sum_s left[s] right[s]^T for one block.
template <class T>
struct ProductBlock {
  T* out;
  const T* base;             // may be out; beta == 0: not read
  const void *left, *right;  // alpha == 0: not read
  T beta, alpha, identity;
};

// Multiply-adds below which a thread is not worth waking.
constexpr double kTaskWork = 1e5;

// What the blocks of a stack have in common: out and base are (rows, columns) with column stride 1.
struct ProductShape {
  int64_t rows, columns, slabs, k;
  bool symmetric;  // rows == columns; of base and of the product the lower triangle, then a mirror
  bool one_operand;  // left and right are the same matrix in every block
  int64_t out_row_stride, base_row_stride;
};

// How the blocks of a stack are computed, worked out once.
//
// k goes in chunks: several whole slabs each, or equal parts of one slab. For each chunk the rows
// of left and of right are packed into panels, then every tile adds its part to out. The sum of an
// element is thus ordered by (slabs, k) alone: the chunks in turn, k ascending inside. Which thread
// computes a tile, and when, changes nothing.
template <class T>
class ProductPlan {
 public:
  // Strides and dtypes as in Operand, whose data is not looked at. T = double takes float64
  // operands, T = float the others.
  ProductPlan(const ProductIsa& isa, const ProductShape& shape, const Operand& left,
              const Operand& right);

  // On the calling thread.
  void run(const ProductBlock<T>& block) const;
  // The same bits, with the tiles of the block shared out over the threads.
  void run_parallel(const ProductBlock<T>& block, const Parallel& parallel) const;
  // Of a stack of blocks, how many (the first ones) to compute on a thread each; to share out the
  // others fills the cores that they would leave idle. Both give the same bits.
  int64_t whole_blocks(int64_t blocks, const Parallel& parallel) const;
  // block_of(b) for every b in [0, blocks), by one of the two.
  template <class BlockOf>
  void run_stack(int64_t blocks, const Parallel& parallel, const BlockOf& block_of) const;

 private:
  ProductChunk chunk(const Operand& operand, const void* data, int64_t index) const;
  bool without_product(const ProductBlock<T>& block) const;
  void add_identity(const ProductBlock<T>& block, int64_t begin, int64_t end) const;
  void update(const ProductBlock<T>& block, int64_t chunk, int64_t i0, int64_t i1, int64_t j0,
              int64_t j1, const T* panels) const;

  const ProductTile<T>& tile_;
  ProductShape shape_;
  Operand left_, right_;
  int64_t slabs_each_ = 1, depth_each_ = 1, parts_ = 1;  // of a chunk; parts of one slab
  int64_t chunks_ = 0;
  int64_t left_size_, panels_size_;  // values of packed left, of packed left and right
  double work_;                      // multiply-adds of a block
};

template <class T>
template <class BlockOf>
void ProductPlan<T>::run_stack(int64_t blocks, const Parallel& parallel,
                               const BlockOf& block_of) const {
  const int64_t whole = whole_blocks(blocks, parallel);
  const int64_t grain = int64_t(kTaskWork / work_) + 1;
  for_each(parallel, whole, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) run(block_of(b));
  });
  for (int64_t b = whole; b < blocks; ++b) run_parallel(block_of(b), parallel);
}

}  // namespace shampoo
