// stat <- beta stat + alpha sum_s left_s grad_s^T over a stack of blocks.
#include "product.h"

namespace shampoo {

void gram_ema(const GramEma& p, const Parallel& parallel) {
  if (p.n == 0 || p.blocks == 0) return;
  const ProductShape shape = {
      p.n, p.n, p.slabs, p.k, true, p.left == p.grad, p.stat_row_stride, p.stat_row_stride};
  const ProductPlan<float> plan(current_product_isa(), shape, p.left, p.grad);
  plan.run_stack(p.blocks, parallel, [&](int64_t b) -> ProductBlock<float> {
    float* stat = p.stat + b * p.stat_block_stride;
    return {stat,
            stat,
            p.left.block(b),
            p.grad.block(b),
            p.beta[b * p.beta_stride],
            p.alpha[b * p.alpha_stride],
            0.0f};
  });
}

}  // namespace shampoo
