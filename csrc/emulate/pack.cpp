// pack.cu on threads: pack float|double unpack factors memory_bytes pieces chunks < the memory, its
// table (rows of 8, with offsets into the memory for pointers), chunks (int32 pairs), decay and
// step if `factors`, in the dtype named > the memory. The memory is exactly as long as was asked
// for.
#include "cuda/pack.cu"

#include "emulate/program.h"

template <class F>
int run(const std::vector<int64_t>& values) {
  if (values.size() != 5) return 2;
  const bool unpack = values[0] != 0, factors = values[1] != 0;
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
  const auto error =
      unpack ? shampoo::unpack_apply_cuda(table, of, nullptr) : shampoo::pack_cuda(table, nullptr);
  if (error) return 1;
  emulate::write(memory);
  return 0;
}

int main(int count, char** arguments) {
  return emulate::by_dtype(count, arguments, run<float>, run<double>);
}
