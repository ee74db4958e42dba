// stat <- beta stat + alpha sum_s left_s grad_s^T over a stack of blocks.
#include "gram.h"
#include "parallel.h"

namespace shampoo {
namespace {

// Multiply-adds of a block from which sharing it out over threads beats the barriers it needs.
constexpr double kSharedWork = 4e6;
// Multiply-adds of a piece of work below which a thread is not worth waking.
constexpr double kTaskWork = 1e5;

const void* offset(const GramOperand& operand, int64_t block) {
  const int64_t bytes = operand.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(operand.data) + block * operand.block_stride * bytes;
}

GramBlock<float> block_of(const GramEma& p, int64_t b) {
  return {p.stat + b * p.stat_block_stride, offset(p.left, b), offset(p.grad, b),
          p.beta[b * p.beta_stride], p.alpha[b * p.alpha_stride]};
}

}  // namespace

void gram_ema(const GramEma& p, const Parallel& parallel) {
  if (p.n == 0 || p.blocks == 0) return;
  const GramPlan<float> plan(current_gram_isa(), p.n, p.slabs, p.k, p.stat_row_stride, p.left,
                             p.grad);
  const double n = double(p.n);
  const double work = n * n * (double(p.slabs) * double(p.k) / 2 + 4);

  // One block per task needs no barrier; sharing a block out fills the cores that the last blocks
  // would leave idle. Both give the same bits.
  const int64_t left_over = p.blocks % parallel.workers;
  const bool worth_sharing =
      parallel.workers > 1 && work > kSharedWork && p.blocks < 8 * parallel.workers;
  const int64_t whole = worth_sharing ? p.blocks - left_over : p.blocks;
  const int64_t grain = int64_t(kTaskWork / work) + 1;
  for_each(parallel, whole, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) plan.run(block_of(p, b));
  });
  for (int64_t b = whole; b < p.blocks; ++b) plan.run_parallel(block_of(p, b), parallel);
}

}  // namespace shampoo
