// One product, blocked for the caches as in Goto and van de Geijn, "Anatomy of high-performance
// matrix multiplication" (2008); of a symmetric one, the tiles that touch the lower triangle.
#include <algorithm>

#include "product.h"
#include "scratch.h"

namespace shampoo {
namespace {

// Bytes of panels that are packed between two barriers. A barrier costs microseconds, but the time
// slice of another process where cores are shared; and with several chunks at hand a piece of out
// stays in the cache while they are added.
constexpr int64_t kWindow = int64_t{32} << 20;

template <class T>
const ProductTile<T>& choose_tile(const ProductIsa& isa, const ProductShape& shape,
                                  const Operand& left, const Operand& right) {
  if constexpr (sizeof(T) == 8) {
    return isa.f64;
  } else {
    if (shape.symmetric && shape.rows <= isa.f32_small.panel_rows) return isa.f32_small;
    const bool bf16 = left.dtype == DType::kBFloat16 && right.dtype == DType::kBFloat16;
    return bf16 && runs_bf16_pairs(isa) ? isa.bf16_pairs : isa.f32;
  }
}

// The matrix as square pieces, row by row; the lower triangle of a symmetric one.
struct Pieces {
  int64_t size, rows, columns;  // of the pieces; how many in each direction
  bool lower;
  int64_t count() const { return lower ? rows * (rows + 1) / 2 : rows * columns; }
  // Calls f(row, column) for piece t.
  template <class F>
  void visit(int64_t t, const F& f) const {
    if (!lower) return f(t / columns, t % columns);
    int64_t row = 0;
    while (t > row) t -= ++row;
    f(row, t);
  }
};

Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace

template <class T>
ProductPlan<T>::ProductPlan(const ProductIsa& isa, const ProductShape& shape, const Operand& left,
                            const Operand& right)
    : tile_(choose_tile<T>(isa, shape, left, right)), shape_(shape), left_(left), right_(right) {
  const int64_t slabs = shape.slabs, k = shape.k;
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
  left_size_ = shape.one_operand ? 0 : round_up(round_up(shape.rows, tile_.panel_rows) * steps, 16);
  panels_size_ = round_up(left_size_ + round_up(shape.columns, tile_.panel_rows) * steps, 16);
  const double depth = double(slabs) * double(k) / (shape.symmetric ? 2 : 1);
  work_ = double(shape.rows) * double(shape.columns) * (depth + 4);
}

template <class T>
int64_t ProductPlan<T>::whole_blocks(int64_t blocks, const Parallel& parallel) const {
  constexpr double kSharedWork = 4e6;  // multiply-adds from which it beats the barriers it needs
  const bool worth_sharing =
      parallel.workers > 1 && work_ > kSharedWork && blocks < 8 * parallel.workers;
  return worth_sharing ? blocks - blocks % parallel.workers : blocks;
}

template <class T>
ProductChunk ProductPlan<T>::chunk(const Operand& operand, const void* data, int64_t index) const {
  static constexpr int kBytes[] = {4, 2, 2, 8};
  const int64_t slab = index / parts_ * slabs_each_, k = index % parts_ * depth_each_;
  const int64_t offset = slab * operand.slab_stride + k * operand.k_stride;
  return {static_cast<const char*>(data) + offset * kBytes[int(operand.dtype)],
          operand.slab_stride,
          operand.row_stride,
          operand.k_stride,
          std::min(slabs_each_, shape_.slabs - slab),
          std::min(depth_each_, shape_.k - k)};
}

// Rows [i0, i1) and columns [j0, j1): the chunk's part and, after the last one, the mirror.
template <class T>
void ProductPlan<T>::update(const ProductBlock<T>& block, int64_t index, int64_t i0, int64_t i1,
                            int64_t j0, int64_t j1, const T* panels) const {
  const ProductChunk c = chunk(right_, block.right, index);
  const bool first = index == 0;
  const auto run = shape_.symmetric ? tile_.update_lower : tile_.update_full;
  run({panels, panels + left_size_, chunk_steps(c.slabs, c.depth, tile_.per_step), block.out,
       first ? block.base : block.out, shape_.out_row_stride,
       first ? shape_.base_row_stride : shape_.out_row_stride, shape_.rows, shape_.columns,
       block.alpha, first ? block.beta : T{1}},
      i0, i1, j0, j1);
  if (index != chunks_ - 1) return;
  add_identity(block, std::max(i0, j0), std::min(i1, j1));
  if (shape_.symmetric) tile_.mirror(block.out, shape_.out_row_stride, i0, i1, j0, j1);
}

template <class T>
void ProductPlan<T>::add_identity(const ProductBlock<T>& block, int64_t begin, int64_t end) const {
  if (block.identity == T{0}) return;
  for (int64_t i = begin; i < end; ++i) block.out[i * shape_.out_row_stride + i] += block.identity;
}

// out <- identity I + beta base: what is left when the sum is empty or alpha is 0.
template <class T>
bool ProductPlan<T>::without_product(const ProductBlock<T>& block) const {
  if (chunks_ > 0 && block.alpha != T{0}) return false;
  for (int64_t i = 0; i < shape_.rows; ++i) {
    T* row = block.out + i * shape_.out_row_stride;
    const T* base = block.base + i * shape_.base_row_stride;
    const int64_t end = shape_.symmetric ? i + 1 : shape_.columns;
    if (block.beta == T{0}) {
      std::fill(row, row + end, T{0});
    } else if (block.beta != T{1} || row != base) {
      for (int64_t j = 0; j < end; ++j) row[j] = block.beta * base[j];
    }
  }
  add_identity(block, 0, std::min(shape_.rows, shape_.columns));
  if (shape_.symmetric) {
    tile_.mirror(block.out, shape_.out_row_stride, 0, shape_.rows, 0, shape_.rows);
  }
  return true;
}

template <class T>
void ProductPlan<T>::run(const ProductBlock<T>& block) const {
  if (without_product(block)) return;
  Scratch& scratch = thread_scratch();
  T* panels = static_cast<T*>(scratch.reserve(panels_size_ * sizeof(T)));
  const int64_t rows = shape_.rows, columns = shape_.columns;
  for (int64_t c = 0; c < chunks_; ++c) {
    if (!shape_.one_operand) {
      tile_.pack[int(left_.dtype)](chunk(left_, block.left, c), rows, 0, rows, panels);
    }
    tile_.pack[int(right_.dtype)](chunk(right_, block.right, c), columns, 0, columns,
                                  panels + left_size_);
    for (int64_t i = 0; i < rows; i += tile_.block) {
      update(block, c, i, std::min(i + tile_.block, rows), 0, columns, panels);
    }
  }
  scratch.trim();
}

template <class T>
void ProductPlan<T>::run_parallel(const ProductBlock<T>& block, const Parallel& parallel) const {
  if (without_product(block)) return;
  const int64_t window =
      std::clamp<int64_t>(kWindow / (panels_size_ * int64_t{sizeof(T)} + 1), 1, chunks_);
  Scratch& scratch = thread_scratch();
  T* panels = static_cast<T*>(scratch.reserve(window * panels_size_ * sizeof(T)));
  const int64_t rows = shape_.rows, columns = shape_.columns, size = tile_.block;
  const Pieces pieces{size, (rows + size - 1) / size, (columns + size - 1) / size,
                      shape_.symmetric};
  const int64_t packs = pieces.rows + pieces.columns;
  for (int64_t first = 0; first < chunks_; first += window) {
    const int64_t count = std::min(window, chunks_ - first);
    for_each(parallel, packs * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t c = t / packs, piece = t % packs;
        T* to = panels + c * panels_size_;
        if (piece < pieces.rows) {
          if (shape_.one_operand) continue;
          tile_.pack[int(left_.dtype)](chunk(left_, block.left, first + c), rows, piece * size,
                                       std::min((piece + 1) * size, rows), to);
        } else {
          const int64_t j = (piece - pieces.rows) * size;
          tile_.pack[int(right_.dtype)](chunk(right_, block.right, first + c), columns, j,
                                        std::min(j + size, columns), to + left_size_);
        }
      }
    });
    for_each(parallel, pieces.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        pieces.visit(t, [&](int64_t row, int64_t column) {
          for (int64_t c = 0; c < count; ++c) {
            update(block, first + c, row * size, std::min((row + 1) * size, rows), column * size,
                   std::min((column + 1) * size, columns), panels + c * panels_size_);
          }
        });
      }
    });
  }
  scratch.trim();
}

template class ProductPlan<float>;
template class ProductPlan<double>;

}  // namespace shampoo
