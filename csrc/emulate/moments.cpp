// moments.cu on threads: moments float|double memory_bytes pieces chunks nesterov sums corrected <
// the memory, its table (rows of 9, with offsets into the memory for pointers, -1 for none), chunks
// (int32 pairs), moves and steps in the dtype named, beta1, beta2 and eps (float64) > the memory,
// which is exactly as long as was asked for, and the squares (float64).
#include "cuda/moments.cu"

#include "emulate/program.h"

template <class T>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 6) return 2;
  auto memory = emulate::read<unsigned char>(values[0]);
  auto pieces = emulate::read<shampoo::MomentPiece>(values[1]);
  const auto chunks = emulate::read<shampoo::PieceChunk>(values[2]);
  const auto moves = emulate::read<T>(values[1]), steps = emulate::read<T>(values[1]);
  const auto numbers = emulate::read<double>(3);
  auto there = [&](const void* offset) -> void* {
    const auto at = reinterpret_cast<intptr_t>(offset);
    return at < 0 ? nullptr : memory.data() + at;
  };
  for (shampoo::MomentPiece& piece : pieces) {
    piece.exp_avg = there(piece.exp_avg);
    piece.exp_avg_sq = there(piece.exp_avg_sq);
    piece.grad = there(piece.grad);
    piece.momentum = there(piece.momentum);
    piece.own = there(piece.own);
  }
  const shampoo::MomentTable table{pieces.data(), chunks.data(), values[1], values[2]};
  const shampoo::MomentRule rule{numbers[0],     numbers[1],     numbers[2],
                                 values[3] != 0, values[4] != 0, values[5] != 0};
  std::vector<double> sums(values[2]), squares(values[1]);
  if (shampoo::moments_cuda(table, rule, moves.data(), steps.data(), sums.data(), squares.data(),
                            nullptr)) {
    return 1;
  }
  emulate::write(memory);
  emulate::write(squares);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
