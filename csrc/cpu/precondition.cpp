// out <- left grad right over a stack of blocks, and the squared norm of each; a block's two
// products follow each other while what is between them is in the cache.
#include <algorithm>
#include <optional>
#include <utility>

#include "product.h"
#include "scratch.h"
#include "squares.h"

namespace shampoo {
namespace {

// left (rows, k) times right (k, columns), both as they lie in the problem, k the second of left.
ProductPlan<float> plan_of(int64_t rows, int64_t columns, int64_t k, const Operand& left,
                           Operand right, int64_t out_row_stride) {
  std::swap(right.row_stride, right.k_stride);  // a plan multiplies by the transpose
  const ProductShape shape = {rows, columns, 1, k, false, false, out_row_stride, out_row_stride};
  return ProductPlan<float>(current_product_isa(), shape, left, right);
}

// The products of a block, one or two, and what lies between the two.
class Chain {
 public:
  explicit Chain(const Precondition& p) : p_(p) {
    const Operand between = {nullptr, DType::kFloat32, 0, 0, p.columns, 1};
    const bool both = p.left.data && p.right.data;
    const int64_t stride = both ? p.columns : p.out_row_stride;
    if (p.left.data) first_.emplace(plan_of(p.rows, p.columns, p.rows, p.left, p.grad, stride));
    if (p.right.data) {
      const Operand& grad = both ? between : p.grad;
      second_.emplace(plan_of(p.rows, p.columns, p.columns, grad, p.right, p.out_row_stride));
    }
  }

  int64_t whole_blocks(const Parallel& parallel) const {
    int64_t whole = p_.blocks;
    for (const auto* plan : {&first_, &second_}) {
      if (*plan) whole = std::min(whole, (*plan)->whole_blocks(p_.blocks, parallel));
    }
    return whole;
  }

  // run(plan, product) for each of them, `between` being scratch (rows, columns).
  template <class Run>
  void run(int64_t b, float* between, const Run& run) const {
    float* out = p_.out + b * p_.out_block_stride;
    const void* grad = p_.grad.block(b);
    if (first_) {
      float* to = second_ ? between : out;
      run(*first_, ProductBlock<float>{to, to, p_.left.block(b), grad, 0.0f, 1.0f, 0.0f});
      grad = between;
    }
    if (second_) {
      run(*second_, ProductBlock<float>{out, out, grad, p_.right.block(b), 0.0f, 1.0f, 0.0f});
    }
  }

  int64_t between() const { return first_ && second_ ? p_.rows * p_.columns : 0; }

 private:
  const Precondition& p_;
  std::optional<ProductPlan<float>> first_, second_;
};

}  // namespace

void precondition(const Precondition& p, const Parallel& parallel) {
  if (p.rows == 0 || p.columns == 0) std::fill(p.norms, p.norms + p.blocks, 0.0f);
  if (p.blocks == 0 || p.rows == 0 || p.columns == 0) return;
  const Chain chain(p);
  auto row_squares = [&](int64_t b, int64_t i) {
    return squares(p.out + b * p.out_block_stride + i * p.out_row_stride, p.columns);
  };
  static thread_local Scratch scratch;
  const int64_t whole = chain.whole_blocks(parallel);
  const double work = double(p.rows) * double(p.columns) * double(p.rows + p.columns);
  for_each(parallel, whole, int64_t(kTaskWork / work) + 1, [&](int64_t begin, int64_t end) {
    float* between = static_cast<float*>(scratch.reserve(chain.between() * sizeof(float)));
    for (int64_t b = begin; b < end; ++b) {
      chain.run(b, between, [](const auto& plan, const auto& block) { plan.run(block); });
      double norm = 0;
      for (int64_t i = 0; i < p.rows; ++i) norm += row_squares(b, i);
      p.norms[b] = float(norm);
    }
    scratch.trim();
  });
  for (int64_t b = whole; b < p.blocks; ++b) {  // shared by all threads, one after the other
    Carve carve(scratch, Carve::bytes<float>(chain.between()) + Carve::bytes<double>(p.rows));
    float* between = carve.take<float>(chain.between());
    double* rows = carve.take<double>(p.rows);
    chain.run(b, between,
              [&](const auto& plan, const auto& block) { plan.run_parallel(block, parallel); });
    for_each(parallel, p.rows, int64_t(kTaskWork / double(p.columns)) + 1,
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) rows[i] = row_squares(b, i);
             });
    double norm = 0;
    for (int64_t i = 0; i < p.rows; ++i) norm += rows[i];
    p.norms[b] = float(norm);
  }
  scratch.trim();
}

}  // namespace shampoo
