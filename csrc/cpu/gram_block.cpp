// One Gram product, blocked for the caches as in Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication" (2008), over the tiles that touch the lower triangle.
#include <algorithm>

#include "gram.h"
#include "parallel.h"
#include "scratch.h"

namespace shampoo {
namespace {

// Bytes of panels that are packed between two barriers. A barrier costs microseconds, but the time
// slice of another process where cores are shared; and with several chunks at hand a piece of stat
// stays in the cache while they are added.
constexpr int64_t kWindow = int64_t{32} << 20;

template <class T>
const GramTile<T>& choose_tile(const GramIsa& isa, DType left, DType grad) {
  if constexpr (sizeof(T) == 8) {
    return isa.f64;
  } else {
    const bool bf16 = left == DType::kBFloat16 && grad == DType::kBFloat16;
    return bf16 && runs_bf16_pairs(isa) ? isa.bf16_pairs : isa.f32;
  }
}

// The lower triangle as square pieces, row by row.
struct Pieces {
  int64_t n, size;
  int64_t rows() const { return (n + size - 1) / size; }
  int64_t count() const { return rows() * (rows() + 1) / 2; }
  // Calls f(i0, i1, j0, j1) for piece t.
  template <class F>
  void visit(int64_t t, const F& f) const {
    int64_t row = 0;
    while (t > row) t -= ++row;
    f(row * size, std::min(row * size + size, n), t * size, std::min(t * size + size, n));
  }
};

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace

template <class T>
GramPlan<T>::GramPlan(const GramIsa& isa, int64_t n, int64_t slabs, int64_t k,
                      int64_t stat_row_stride, const GramOperand& left, const GramOperand& grad)
    : tile_(choose_tile<T>(isa, left.dtype, grad.dtype)),
      n_(n),
      slabs_(slabs),
      k_(k),
      stat_row_stride_(stat_row_stride),
      left_(left),
      grad_(grad) {
  if (slabs > 0 && k > 0) {
    if (k <= tile_.depth) {
      slabs_each_ =
          std::min(slabs, std::max<int64_t>(1, tile_.depth / round_up(k, tile_.per_step)));
      depth_each_ = k;
    } else {
      const int64_t parts = (k + tile_.depth - 1) / tile_.depth;
      depth_each_ = round_up((k + parts - 1) / parts, 16);  // 16: packing has no remainders inside
      parts_ = (k + depth_each_ - 1) / depth_each_;
    }
    chunks_ = (slabs + slabs_each_ - 1) / slabs_each_ * parts_;
  }
  const int64_t steps = chunk_steps(slabs_each_, depth_each_, tile_.per_step);
  left_size_ = round_up(n, tile_.left_rows) / tile_.left_rows * tile_.left_width * steps;
  panels_size_ = round_up(left_size_ + round_up(n, tile_.grad_rows) * steps, 16);
}

template <class T>
GramChunk GramPlan<T>::chunk(const GramOperand& operand, const void* data, int64_t index) const {
  static constexpr int kBytes[] = {4, 2, 2, 8};
  const int64_t slab = index / parts_ * slabs_each_, k = index % parts_ * depth_each_;
  const int64_t offset = slab * operand.slab_stride + k * operand.k_stride;
  return {static_cast<const char*>(data) + offset * kBytes[int(operand.dtype)],
          operand.slab_stride,
          operand.row_stride,
          operand.k_stride,
          std::min(slabs_each_, slabs_ - slab),
          std::min(depth_each_, k_ - k)};
}

// Rows [begin, end), whole multiples of left_block, of a chunk into panels of left, then of grad.
template <class T>
void GramPlan<T>::pack(const GramBlock<T>& block, int64_t index, int64_t begin, int64_t end,
                       T* panels) const {
  tile_.pack_left[int(left_.dtype)](chunk(left_, block.left, index), n_, begin, end, panels);
  tile_.pack_grad[int(grad_.dtype)](chunk(grad_, block.grad, index), n_, begin, end,
                                    panels + left_size_);
}

// Rows [i0, i1) and columns [j0, j1): the chunk's part and, after the last one, the mirror.
template <class T>
void GramPlan<T>::update(const GramBlock<T>& block, int64_t index, int64_t i0, int64_t i1,
                         int64_t j0, int64_t j1, const T* panels) const {
  const GramChunk c = chunk(grad_, block.grad, index);
  const int64_t steps = chunk_steps(c.slabs, c.depth, tile_.per_step);
  tile_.update({panels, panels + left_size_, steps, block.stat, stat_row_stride_, n_, block.alpha,
                index == 0 ? block.beta : T{1}},
               i0, i1, j0, j1);
  if (index == chunks_ - 1) tile_.mirror(block.stat, stat_row_stride_, i0, i1, j0, j1);
}

// stat <- beta stat, mirrored: what is left of the update when the sum is empty or alpha is 0.
template <class T>
bool GramPlan<T>::scale_only(const GramBlock<T>& block) const {
  if (chunks_ > 0 && block.alpha != T{0}) return false;
  for (int64_t i = 0; i < n_; ++i) {
    T* row = block.stat + i * stat_row_stride_;
    if (block.beta == T{0}) {
      std::fill(row, row + i + 1, T{0});
    } else if (block.beta != T{1}) {
      for (int64_t j = 0; j <= i; ++j) row[j] *= block.beta;
    }
  }
  tile_.mirror(block.stat, stat_row_stride_, 0, n_, 0, n_);
  return true;
}

template <class T>
void GramPlan<T>::run(const GramBlock<T>& block) const {
  if (scale_only(block)) return;
  Scratch& scratch = thread_scratch();
  T* panels = static_cast<T*>(scratch.reserve(panels_size_ * sizeof(T)));
  for (int64_t c = 0; c < chunks_; ++c) {
    pack(block, c, 0, n_, panels);
    for (int64_t i = 0; i < n_; i += tile_.left_block) {
      update(block, c, i, std::min(i + tile_.left_block, n_), 0, n_, panels);
    }
  }
  scratch.trim();
}

template <class T>
void GramPlan<T>::run_parallel(const GramBlock<T>& block, const Parallel& parallel) const {
  if (scale_only(block)) return;
  const int64_t window =
      std::clamp<int64_t>(kWindow / (panels_size_ * int64_t{sizeof(T)} + 1), 1, chunks_);
  Scratch& scratch = thread_scratch();
  T* panels = static_cast<T*>(scratch.reserve(window * panels_size_ * sizeof(T)));
  const Pieces pieces{n_, tile_.left_block};
  for (int64_t first = 0; first < chunks_; first += window) {
    const int64_t count = std::min(window, chunks_ - first);
    for_each(parallel, pieces.rows() * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t c = t / pieces.rows(), row = t % pieces.rows() * pieces.size;
        pack(block, first + c, row, std::min(row + pieces.size, n_), panels + c * panels_size_);
      }
    });
    for_each(parallel, pieces.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        pieces.visit(t, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
          for (int64_t c = 0; c < count; ++c) {
            update(block, first + c, i0, i1, j0, j1, panels + c * panels_size_);
          }
        });
      }
    });
  }
  scratch.trim();
}

template class GramPlan<float>;
template class GramPlan<double>;

}  // namespace shampoo
