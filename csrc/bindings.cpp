// torch.ops.shampoo_kernels_native through the LibTorch stable ABI, and the module _C. The ops are
// implemented in cpu/bindings_*.cpp and cuda/bindings_*.cpp.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(SHAMPOO_CUDA)
#include "cuda/launchers.h"
#endif

#if !defined(SHAMPOO_CUDA_ARCHS)
#define SHAMPOO_CUDA_ARCHS ""
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

pybind11::dict build_facts() {
  pybind11::dict facts;
  facts["compiler"] = compiler();
  facts["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56 & 0xff) + "." +
                          std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  facts["isas"] = shampoo::built_isas();
  facts["cuda_archs"] = SHAMPOO_CUDA_ARCHS;
  return facts;
}

}  // namespace

STABLE_TORCH_LIBRARY(shampoo_kernels_native, m) {
  m.def(
      "gram_ema_(Tensor(a!) stat, Tensor left, Tensor grad, float beta, float alpha, "
      "Tensor? beta_tensor, Tensor? alpha_tensor) -> ()");
  m.def(
      "product_(Tensor(a!) out, Tensor left, Tensor right, Tensor? base, float identity, "
      "float beta, float alpha, bool symmetric) -> ()");
  m.def("precondition_(Tensor(a!) out, Tensor grad, Tensor? left, Tensor? right) -> Tensor");
  m.def("eigenvalue_bound(Tensor A) -> Tensor");
  m.def(
      "inverse_root_eigh_(Tensor A, float p, float ridge, float? rank_rtol, Tensor? scale, "
      "Tensor? previous, Tensor(a!) root, Tensor(b!) residual, Tensor(c!) status) -> ()");
  m.def(
      "inverse_root_newton_(Tensor A, int p, float ridge, Tensor steps, Tensor? scale, "
      "Tensor? previous, Tensor(a!) root, Tensor(b!) residual, Tensor(c!) status) -> ()");
  // CUDA alone; steps: (count, 6) float64 on the CPU, rows of RootSteps<T>::Step
  // (cuda/launchers.h).
  m.def(
      "inverse_root_small_(Tensor A, int p, float ridge, Tensor steps, bool tensor_cores, "
      "Tensor? scale, Tensor? previous, Tensor(a!) root, Tensor(b!) residual, Tensor(c!) status) "
      "-> ()");
  m.def("power_iteration(Tensor A, int steps, int vectors) -> Tensor");
  m.def(
      "orthogonal_iteration_(Tensor A, Tensor Q, float lift, int steps, Tensor(a!) eigenvalues, "
      "Tensor(b!) basis) -> ()");
  // Tables as in ops/pack.py, of pointers that the caller answers for.
  m.def("pack_(Tensor pieces, Tensor chunks) -> ()");
  m.def("write_table_(Tensor(a!) to, Tensor from) -> ()");  // CUDA alone; from: on the CPU
  m.def("pack_finite_(Tensor pieces, Tensor chunks, bool negate) -> Tensor");
  m.def(
      "moments_(Tensor pieces, Tensor chunks, Tensor moves, Tensor steps, float beta1, "
      "float beta2, float eps, bool nesterov, bool sums, bool corrected) -> Tensor");
  m.def("unpack_apply_(Tensor pieces, Tensor chunks, Tensor? decay, Tensor? step) -> ()");
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native kernels of shampoo_kernels; importing it registers "
      "torch.ops.shampoo_kernels_native.";
  m.def("build_facts", &build_facts, "Compiler, torch target, instruction sets, CUDA archs.");
  m.def("isas", &shampoo::isas, "Instruction sets of the products that run here, best first.");
  m.def("isa", &shampoo::isa, "The one in use.");
  m.def("multiplies_bfloat16", &shampoo::multiplies_bf16, "Whether it does that by pairs.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!shampoo::set_isa(name)) {
          throw pybind11::value_error("set_isa: name must be one of isas(), got '" + name + "'");
        }
      },
      pybind11::arg("name"), "Use another one, for tests.");
  m.def(
      "peak_gflops", [] { return shampoo::peak_gflops(shampoo::torch_threads()); },
      "Measured float32 FMA rate on torch's threads, for benchmarks.");
  m.def("has_lapack", &shampoo::has_lapack, "Whether inverse_root_eigh_ can run.");
  m.def("has_qr", &shampoo::has_qr, "Whether orthogonal_iteration_ can run.");
#if defined(SHAMPOO_CUDA)
  m.def(
      "inverse_root_small_bytes",
      [](int64_t n, bool wide, bool tensor_cores) {
        return wide ? shampoo::inverse_root_small_bytes<double>(n, tensor_cores)
                    : shampoo::inverse_root_small_bytes<float>(n, tensor_cores);
      },
      "Shared memory that inverse_root_small_ needs; wide: float64.");
  m.def(
      "orthogonal_iteration_bytes",
      [](int64_t n, bool wide) {
        return wide ? shampoo::orthogonal_iteration_bytes<double>(n)
                    : shampoo::orthogonal_iteration_bytes<float>(n);
      },
      "Shared memory that orthogonal_iteration_ needs on a GPU.");
#endif
}
