// pack.cu on threads: pack float|double mode flag memory_bytes pieces chunks < the memory, its
// table (rows of 8, with offsets into the memory for pointers), chunks (int32 pairs) > the memory,
// which is exactly as long as was asked for. Modes: 0 pack; 1 unpack, with the flag then decay and
// step in the dtype named; 2 pack what is finite, with the flag negated > then the squares.
#include "cuda/pack.cu"

#include "emulate/program.h"

template <class F>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 5) return 2;
  const int64_t mode = values[0];
  const bool flag = values[1] != 0, factors = mode == 1 && flag;
  auto memory = emulate::read<unsigned char>(values[2]);
  auto pieces = emulate::read<shampoo::Piece>(values[3]);
  const auto chunks = emulate::read<shampoo::PieceChunk>(values[4]);
  const auto decay = emulate::read<F>(factors ? values[3] : 0);
  const auto step = emulate::read<F>(factors ? values[3] : 0);
  for (shampoo::Piece& piece : pieces) {
    piece.data = memory.data() + reinterpret_cast<uintptr_t>(piece.data);
    piece.packed = memory.data() + reinterpret_cast<uintptr_t>(piece.packed);
  }
  const shampoo::PieceTable table{pieces.data(), chunks.data(), values[4]};
  const shampoo::PieceFactors<F> of{factors ? decay.data() : nullptr,
                                    factors ? step.data() : nullptr};
  std::vector<double> sums(values[4]), squares(mode == 2 ? values[3] : 0);
  cudaError_t error = cudaSuccess;
  if (mode == 0) error = shampoo::pack_cuda(table, nullptr);
  if (mode == 1) error = shampoo::unpack_apply_cuda(table, of, nullptr);
  if (mode == 2) {
    error = shampoo::pack_finite_cuda(table, values[3], flag, sums.data(), squares.data(), nullptr);
  }
  if (error) return 1;
  emulate::write(memory);
  emulate::write(squares);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
