// out <- identity I + beta base + alpha left right^T over a stack of blocks.
#include "product.h"

namespace shampoo {

void product(const Product& p, const Parallel& parallel) {
  if (p.blocks == 0 || p.rows == 0 || p.columns == 0) return;
  const ProductShape shape = {
      p.rows,           p.columns,        1, p.k, p.symmetric, p.left == p.right,
      p.out_row_stride, p.base_row_stride};
  const ProductPlan<float> plan(current_product_isa(), shape, p.left, p.right);
  plan.run_stack(p.blocks, parallel, [&](int64_t b) -> ProductBlock<float> {
    return {p.out + b * p.out_block_stride,
            p.base + b * p.base_block_stride,
            p.left.block(b),
            p.right.block(b),
            p.beta,
            p.alpha,
            p.identity};
  });
}

}  // namespace shampoo
