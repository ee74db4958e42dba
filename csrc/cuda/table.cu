// A table from the host into device memory by way of the arguments of kernels. They are copied when
// a kernel is launched, so the host's memory may go at once; and when a CUDA graph is captured they
// are copied into the graph, every replay of which writes the table anew: nothing has to outlive
// anything, as host memory would that a graph copies from.
//
// Proven in emulation: the numbers and the bounds (tests/test_pack.py). Unproven until run on a
// GPU: that a captured graph keeps its tables (check_graph of bench/gpu_checks_native.py).
#include "cuda/launchers.h"
#include "cuda/shared_memory.h"

namespace shampoo {
namespace {

constexpr int kThreads = 256;

struct Part {
  static constexpr int kWords = 448;  // a kernel takes 4 KB of arguments everywhere
  int64_t words[kWords];
};

__global__ void __launch_bounds__(kThreads) write_table_kernel(Part part, int count, int64_t* to) {
  for (int at = threadIdx.x; at < count; at += kThreads) to[at] = part.words[at];
}

}  // namespace

cudaError_t write_table_cuda(const int64_t* from, int64_t count, int64_t* to, cudaStream_t stream) {
  for (int64_t start = 0; start < count; start += Part::kWords) {
    const int here = static_cast<int>(count - start < Part::kWords ? count - start : Part::kWords);
    Part part{};
    for (int at = 0; at < here; ++at) part.words[at] = from[start + at];
    const cudaError_t error =
        launch(write_table_kernel, 1, kThreads, 0, stream, part, here, to + start);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace shampoo
