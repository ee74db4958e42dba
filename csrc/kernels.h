// Every launcher of the package: plain pointers, sizes, strides, and no torch. All strides count
// elements, not bytes. The CPU launchers may be called from several threads at once.
//
// Any C++20 program can call those of cpu/: examples/gram_and_bound.cpp does, and tells how to
// compile them. Sizes, strides and overlaps are the caller's to get right: nothing is checked.
// Matrices are row-major where strides are not given. Results are complete on return; where
// std::bad_alloc is thrown, what was to be written is unspecified.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace shampoo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// The caller's thread pool. `run` calls body(context, worker) for every worker in [0, workers), at
// the same time or one after the other, and returns when all calls have returned. It must forward
// exceptions (std::bad_alloc is the only one thrown) or be used with memory to spare. With one
// worker, as in Parallel{}, the caller's thread does everything and `run` is not called.
struct Parallel {
  int64_t workers = 1;
  void (*run)(int64_t workers, void (*body)(void* context, int64_t worker),
              void* context) = nullptr;
};

// An operand of a product, (blocks, slabs, rows, k); any stride may be 0. A row-major stack
// (blocks, rows, k) has one slab and strides rows * k, 0, k, 1; its transposes have rows and k, and
// their strides, exchanged.
struct Operand {
  const void* data;
  DType dtype;
  int64_t block_stride, slab_stride, row_stride, k_stride;

  bool operator==(const Operand&) const = default;
  const void* block(int64_t b) const {
    constexpr int64_t kBytes[] = {4, 2, 2, 8};
    return static_cast<const char*>(data) + b * block_stride * kBytes[int(dtype)];
  }
};

// out[b] <- identity I + beta base[b] + alpha left[b] right[b]^T, with one slab per operand. The
// bits are as in gram_ema.
struct Product {
  int64_t blocks, rows, columns, k;  // any of them may be 0
  bool symmetric;  // the caller knows that out is: the lower triangle is computed and mirrored
  float* out;      // (blocks, rows, columns), column stride 1, not overlapping left and right
  int64_t out_block_stride, out_row_stride;
  const float* base;  // likewise, may be out; beta == 0: not read
  int64_t base_block_stride, base_row_stride;
  Operand left, right;  // kFloat32, kBFloat16 or kFloat16; alpha == 0: not read
  float identity, beta, alpha;
};
void product(const Product& problem, const Parallel& parallel);

// stat[b] <- beta[b] stat[b] + alpha[b] sum_s left[b, s] grad[b, s]^T, which the caller knows to be
// symmetric: the lower triangle is computed and mirrored. The Gram matrix G G^T of one gradient per
// block is left = grad = G with one slab.
struct GramEma {
  int64_t blocks, n, slabs, k;  // any of them may be 0
  float* stat;                  // (blocks, n, n): lower triangle read, both triangles written
  int64_t stat_block_stride, stat_row_stride;  // row stride >= n, column stride 1
  Operand left, grad;                 // kFloat32, kBFloat16, kFloat16; not overlapping stat
  const float* beta;                  // beta[b] == 0: stat[b] is not read
  const float* alpha;                 // alpha[b] == 0: left[b] and grad[b] are not read
  int64_t beta_stride, alpha_stride;  // 0: one number for all blocks
};

// out[b] <- left[b] grad[b] right[b] and norms[b] <- the sum of its squares, in float64, rounded.
// The bits are those of two products.
struct Precondition {
  int64_t blocks, rows, columns;  // of grad and out; any of them may be 0
  float* out;  // (blocks, rows, columns), column stride 1, overlapping no operand
  int64_t out_block_stride, out_row_stride;
  Operand grad, left, right;  // k: the second index of each; left or right without data: identity
  float* norms;               // (blocks,)
};
void precondition(const Precondition& problem, const Parallel& parallel);

// A block's bits depend on that block and on isa() alone. The sums run in float32 over k, then over
// slabs; products of two 16-bit numbers are exact (bf16 pair instructions flush subnormals to 0).
void gram_ema(const GramEma& problem, const Parallel& parallel);

// A stack (blocks, n, n) of symmetric matrices of which only the lower triangle is read. In order:
// {data, blocks, n, n * n, n, 1}.
template <class T>
struct SymmetricStack {
  const T* data;
  int64_t blocks, n;
  int64_t block_stride, row_stride, column_stride;
};

// bound[b] >= the largest eigenvalue of stack[b], at most 1.01 times the least of three textbook
// bounds (cpu/eigenvalue_bound.h). NaN in a lower triangle gives NaN, else Inf gives Inf, for that
// block alone; a zero or empty block gives 0. T: float, double. `bound`: (blocks,).
template <class T>
void eigenvalue_bound(const SymmetricStack<T>& stack, T* bound, const Parallel& parallel);

enum class RootStatus : int8_t { kConverged = 0, kKeptPrevious = 2, kFailed = 3 };

// root[b] <- (B + ridge * eigenvalue_bound(B) I)^(-1/p), B = scale[b] A[b].
template <class T>
struct InverseRoot {
  SymmetricStack<T> A;
  const T* scale;  // (blocks,) or null: 1
  int64_t scale_stride;
  double p;           // > 0
  double ridge;       // >= 0
  const T* previous;  // (blocks, n, n) or null: what a block that has no root keeps
  int64_t previous_block_stride, previous_row_stride, previous_column_stride;
  T* root;  // (blocks, n, n), each contiguous; may be previous, may not overlap A
  int64_t root_block_stride;
  T* residual;     // (blocks,)
  int8_t* status;  // (blocks,): RootStatus
};

// Both: numbers never fail, see cpu/inverse_root.h for what a block without a root gets; a block's
// bits depend on that block alone, whatever the threads.
//
// One LAPACK eigensolver call per block on one thread; residual 0, or Inf where there is no root.
// rank_rtol >= 0: eigenvalues <= rank_rtol * the largest contribute nothing (pseudo-inverse root);
// < 0: off. Requires has_lapack(); throws std::runtime_error otherwise.
template <class T>
void inverse_root_eigh(const InverseRoot<T>& problem, double rank_rtol, const Parallel& parallel);

// h(M) = a I + b M + c Q^2 of every step, for eigenvalues of A / bound from a floor (which the
// steps are made for) to 1; Q = t I + s M + M^2, or M itself where s is 0.
struct NewtonSchedule {
  struct Step {
    float a, b, c, s, t;
  };
  const Step* steps;
  int64_t count;  // >= 1
  uint32_t p;     // >= 1, equal to that of the problem
};
// By products alone; residual max |M - I|, see cpu/inverse_root_newton.cpp.
void inverse_root_newton(const InverseRoot<float>& problem, const NewtonSchedule& schedule,
                         const Parallel& parallel);

// estimate[b] <- the largest |eigenvalue| of stack[b], of which both triangles are read, from
// below: `steps` times V <- orth(A V) from `vectors` fixed vectors (n at most count), then |A v| /
// |v| for the best v in their span. 0 for a zero block, NaN for one that is not finite. `estimate`:
// (blocks,); T: float, double; n, steps and vectors >= 1.
template <class T>
void power_iteration(const SymmetricStack<T>& stack, int64_t steps, int64_t vectors, T* estimate,
                     const Parallel& parallel);

// (blocks, n, n), any strides.
template <class T>
struct MatrixStack {
  const T* data;
  int64_t block_stride, row_stride, column_stride;

#if defined(__CUDACC__)
  __host__ __device__
#endif
      T at(int64_t b, int64_t i, int64_t j) const {
    return data[b * block_stride + i * row_stride + j * column_stride];
  }
};

// `steps` times Q <- orth(A Q + lift max_k |q_k^T A q_k| Q), by QR with diag(R) >= 0; a Q whose
// successor would be zero or not finite stays. Then eigenvalues = diag(Q^T A Q), NaN where A Q is
// not finite. T: float, double.
template <class T>
struct OrthogonalIteration {
  int64_t blocks, n;
  MatrixStack<T> A, Q;  // A symmetric, both triangles read; Q with orthonormal columns
  double lift;
  int64_t steps;   // >= 0
  T* eigenvalues;  // (blocks, n) contiguous
  T* basis;        // (blocks, n, n) contiguous, the new Q; may overlap neither A nor Q
};
// One LAPACK QR per block and step on one thread; requires has_qr().
template <class T>
void orthogonal_iteration(const OrthogonalIteration<T>& problem, const Parallel& parallel);
bool has_qr();  // whether this process holds ?geqrf_ and ?orgqr_

// A matrix somewhere in memory and its place in a stack, one row of a table of int64. The two do
// not overlap, and no two pieces of a call write to the same memory.
struct Piece {
  void* data;    // (rows, columns) of dtype, any strides
  void* packed;  // (rows, columns) of packed_dtype, contiguous
  int64_t rows, columns, row_stride, column_stride;
  int64_t dtype, packed_dtype;  // DType
};
static_assert(sizeof(Piece) == 8 * sizeof(int64_t));

// What one thread or thread block does at a time: the elements of pieces[piece] from chunk *
// kChunkElements on, in rows, so many at most.
struct PieceChunk {
  int32_t piece, chunk;
};
constexpr int64_t kChunkElements = 8192;

struct PieceTable {
  const Piece* pieces;
  const PieceChunk* chunks;  // every chunk of every piece, in order
  int64_t chunk_count;
};

// packed <- data of every piece, cast.
void pack(const PieceTable& pieces, const Parallel& parallel);

// packed <- data, cast, or with `negate` -data, of the pieces whose sum of squares, in float32 (in
// float64 of float64 data), is a number; 0 of the others, which may be anything. The sums go to
// squares (pieces,), Inf or NaN for the others.
void pack_finite(const PieceTable& pieces, int64_t count, bool negate, double* squares,
                 const Parallel& parallel);

// data <- decay[i] data + step[i] packed of piece i, in float32, or in float64 where one of the two
// is; without factors data <- packed. decay[i] = 0 does not read data, step[i] = 0 does not read
// packed, and with decay[i] = 1 too nothing is written. F: float, double.
template <class F>
struct PieceFactors {
  const F* decay;  // (pieces,) or null, both
  const F* step;
};
template <class F>
void unpack_apply(const PieceTable& pieces, const PieceFactors<F>& factors,
                  const Parallel& parallel);

// A piece of the averages of a gradient, one row of a table of int64. `grad`, `momentum` and `own`
// are contiguous; everything is T.
struct MomentPiece {
  void* exp_avg;     // (rows, columns), any strides
  void* exp_avg_sq;  // as exp_avg, or null: there are no squares
  const void* grad;  // finite
  void* momentum;    // receives the average, with `nesterov` as it would be one gradient later
  void* own;         // receives the step of the graft, or null: nobody asks
  int64_t rows, columns, row_stride, column_stride;
};
static_assert(sizeof(MomentPiece) == 9 * sizeof(int64_t));

// How the averages move, and what the graft is: m / (sqrt(v) + eps sqrt(bias)).
struct MomentRule {
  double beta1, beta2, eps;
  bool nesterov;
  bool sums;       // v <- v + G^2, else v <- beta2 v + (1 - beta2) G^2
  bool corrected;  // bias = 1 - beta2^step, else 1
};

struct MomentTable {
  const MomentPiece* pieces;
  const PieceChunk* chunks;  // every chunk of every piece, in order
  int64_t count, chunk_count;
};

// exp_avg, exp_avg_sq of the pieces with moves[i] = 1 take the gradient in; where it is 0 they stay
// as they are. steps[i]: gradients seen, this one included. The sums of the squares of
// the steps, which are the momentum without exp_avg_sq, go to squares (pieces,).
template <class T>
void moments(const MomentTable& table, const MomentRule& rule, const T* moves, const T* steps,
             double* squares, const Parallel& parallel);

// Whether this process holds ssyevd_ and dsyevd_ (libtorch_cpu exports them where built with MKL).
bool has_lapack();

// GFLOP/s of float32 multiply-adds in registers, the best of a few runs on all workers.
double peak_gflops(const Parallel& parallel);

// Instruction sets of the products that were compiled in, whether or not this CPU has them.
std::vector<std::string> built_isas();
// Instruction sets of the products, best first: those built in and runnable here, then emulated
// ones ("...-generic": the same code for another vector width, slow, for tests).
std::vector<std::string> isas();
std::string isa();                      // the one in use: the best, unless set_isa was called
bool multiplies_bf16();                 // whether the product in use has instructions for it
bool set_isa(const std::string& name);  // false, and no change, for a name that isas() lacks

}  // namespace shampoo
