// Inverse p-th roots by products alone: the coupled Newton iteration (M-form) with a fixed schedule
// of polynomials h(M) = a I + b M + c Q^2, Q = t I + s M + M^2 or M, for spectra in [floor, 1]:
//   M_0 = (A + ridge bound I) / ((1 + ridge) bound),  X_0 = I;   X <- X h(M),  M <- h(M)^p M.
// M -> I and X -> M_0^(-1/p). All factors are polynomials of one matrix, so every product is
// symmetric: half of it is computed and mirrored (float32 tolerates that, lower precision does not).
//
// A block has no root if its bound is not positive and finite, if max |M - I| of the last M (the
// residual) is 0.05 or more, or if the result overflows or vanishes.
#include <utility>

#include "inverse_root.h"
#include "product.h"
#include "scratch.h"

namespace shampoo {
namespace {

constexpr double kResidualLimit = 0.05;

// Scratch of one block: n x n matrices, and 3 n doubles.
struct Workspace {
  float* matrices[4];
  double* bound;

  explicit Workspace(int64_t n) {
    static thread_local Scratch scratch;
    Carve carve(scratch, 4 * Carve::bytes<float>(n * n) + Carve::bytes<double>(3 * n));
    for (float*& matrix : matrices) matrix = carve.take<float>(n * n);
    bound = carve.take<double>(3 * n);
  }
};

// max |M - I| of a symmetric M; infinity where it is not finite.
double distance_to_identity(const float* M, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (float x : {largest_magnitude(M + i * n, i), std::abs(M[i * n + i] - 1)}) {
      if (!std::isfinite(x)) return std::numeric_limits<double>::infinity();
      largest = std::max(largest, x);
    }
  }
  return double(largest);
}

// The iteration on one block; multiply(block) computes a product of symmetric matrices.
template <class Multiply>
void newton(const InverseRoot<float>& problem, const NewtonSchedule& schedule, int64_t b,
            const Multiply& multiply) {
  const int64_t n = problem.A.n;
  Workspace work(n);
  float *M = work.matrices[0], *X = work.matrices[1], *h = work.matrices[2];
  float* spare = work.matrices[3];
  const ScaledBlock<float> scaled(problem, b, spare, false, work.bound);
  if (!scaled.has_scale()) {
    const double residual = n == 0 ? 0 : std::numeric_limits<double>::infinity();
    return write_root(problem, scaled, b, X, n == 0, residual);
  }
  const double scale = (1 + problem.ridge) * scaled.bound;
  // out <- a I + b base + c left right
  auto combine = [&](float* out, const float* left, const float* right, const float* base, float a,
                     float b, float c) { multiply({out, base, left, right, b, c, a}); };
  combine(M, nullptr, nullptr, spare, float(problem.ridge / (1 + problem.ridge)), float(1 / scale),
          0.0f);

  auto polynomial = [&](float* out, int64_t step, float factor) {
    const NewtonSchedule::Step& s = schedule.steps[step];
    const float* Q = M;
    if (s.s != 0) {
      combine(spare, M, M, M, s.t, s.s, 1.0f);
      Q = spare;
    }
    combine(out, Q, Q, M, factor * s.a, factor * s.b, factor * s.c);
  };
  auto product = [&](float*& to, const float* left, const float* right, float factor) {
    combine(spare, left, right, spare, 0.0f, 0.0f, factor);
    std::swap(to, spare);
  };
  // What M_0 was divided by, taken back in the last product.
  const double exponent = -1 / problem.p;
  const auto unscale = float(std::pow(scale, exponent) * std::exp2(scaled.exponent * exponent));
  const int64_t last = schedule.count - 1;
  polynomial(X, 0, last == 0 ? unscale : 1.0f);
  for (int64_t step = 1; step <= last; ++step) {
    const float* power = step == 1 ? X : h;  // the polynomial of the step before, squared in turn
    for (uint32_t rest = schedule.p;;) {
      if (rest & 1) product(M, M, power, 1.0f);
      if (!(rest >>= 1)) break;
      product(h, power, power, 1.0f);
      power = h;
    }
    polynomial(h, step, 1.0f);
    product(X, X, h, step == last ? unscale : 1.0f);
  }
  const double residual = distance_to_identity(M, n);
  const bool is_root = residual < kResidualLimit && is_number(X, n);
  write_root(problem, scaled, b, X, is_root, residual);
}

}  // namespace

void inverse_root_newton(const InverseRoot<float>& problem, const NewtonSchedule& schedule,
                         const Parallel& parallel) {
  const int64_t n = problem.A.n;
  // Rows are columns, because all are symmetric.
  const Operand matrix = {nullptr, DType::kFloat32, 0, 0, 1, n};
  ProductShape shape = {n, n, 1, n, true, false, n, n};
  const ProductPlan<float> product(current_product_isa(), shape, matrix, matrix);
  shape.one_operand = true;
  const ProductPlan<float> square(current_product_isa(), shape, matrix, matrix);
  auto plan = [&](const ProductBlock<float>& block) -> const ProductPlan<float>& {
    return block.left == block.right ? square : product;
  };
  const int64_t whole = product.whole_blocks(problem.A.blocks, parallel);
  for_each(parallel, whole, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      newton(problem, schedule, b,
             [&](const ProductBlock<float>& block) { plan(block).run(block); });
    }
  });
  for (int64_t b = whole; b < problem.A.blocks; ++b) {
    newton(problem, schedule, b,
           [&](const ProductBlock<float>& block) { plan(block).run_parallel(block, parallel); });
  }
}

}  // namespace shampoo
