// torch.ops.shampoo_kernels_native through the LibTorch stable ABI, and the module _C.
//
// The Python side validates shapes, dtypes and options with messages for people; the checks here
// are those that memory safety needs, because the ops can be called directly.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels.h"

#if !defined(SHAMPOO_CUDA_ARCHS)
#define SHAMPOO_CUDA_ARCHS ""
#endif

namespace {

using shampoo::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's thread pool.
shampoo::Parallel torch_threads() {
  return {int64_t{torch::stable::get_num_threads()},
          [](int64_t workers, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

void check_cpu(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", t.dim());
}

void check_size(const char* op, const char* name, const Tensor& t, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, op, ": ", name, " must have size ", size, " in dimension ",
                  dim, ", got ", t.size(dim));
}

void check_same_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
}

DType product_dtype(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
}

shampoo::Operand gram_operand(const char* name, const Tensor& t, const Tensor& stat) {
  const char* op = "gram_ema_";
  check_cpu(op, name, t, 4);
  check_size(op, name, t, 0, stat.size(0));
  check_size(op, name, t, 2, stat.size(1));
  const DType dtype = product_dtype(op, name, t);
  return {t.const_data_ptr(), dtype, t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// A float32 stack of matrices that is written or added to by rows.
void check_rows(const char* op, const char* name, const Tensor& t) {
  check_same_dtype(op, name, t, ScalarType::Float);
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, op, ": ", name,
                  " must have column stride 1, got ", t.stride(2));
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) >= t.size(2), op, ": ", name,
                  " must have a row stride of at least ", t.size(2), ", got ", t.stride(1));
}

// out <- identity I + beta base + alpha left @ right; base None: out itself.
void product_(Tensor out, Tensor left, Tensor right, std::optional<Tensor> base, double identity,
              double beta, double alpha, bool symmetric) {
  const char* op = "product_";
  const Tensor& added = base.has_value() ? *base : out;
  check_cpu(op, "out", out, 3);
  const int64_t blocks = out.size(0), rows = out.size(1), columns = out.size(2), k = left.size(2);
  auto check_shape = [&](const char* name, const Tensor& t, int64_t size1, int64_t size2) {
    check_cpu(op, name, t, 3);
    check_size(op, name, t, 0, blocks);
    check_size(op, name, t, 1, size1);
    check_size(op, name, t, 2, size2);
  };
  check_shape("base", added, rows, columns);
  check_shape("left", left, rows, k);
  check_shape("right", right, k, columns);
  check_rows(op, "out", out);
  check_rows(op, "base", added);
  STD_TORCH_CHECK(blocks <= 1 || rows * columns == 0 || out.stride(0) != 0, op,
                  ": out's blocks overlap");
  STD_TORCH_CHECK(!symmetric || rows == columns, op, ": symmetric needs a square out");
  shampoo::product({blocks,
                    rows,
                    columns,
                    k,
                    symmetric,
                    out.mutable_data_ptr<float>(),
                    out.stride(0),
                    out.stride(1),
                    added.const_data_ptr<float>(),
                    added.stride(0),
                    added.stride(1),
                    {left.const_data_ptr(), product_dtype(op, "left", left), left.stride(0), 0,
                     left.stride(1), left.stride(2)},
                    {right.const_data_ptr(), product_dtype(op, "right", right), right.stride(0), 0,
                     right.stride(2), right.stride(1)},
                    float(identity),
                    float(beta),
                    float(alpha)},
                   torch_threads());
}

// A factor per block: the tensor's 1 or B numbers, else the float.
struct Factor {
  Factor(const char* name, double number, const std::optional<Tensor>& tensor, int64_t blocks)
      : number_(float(number)), data(&number_), stride(0) {
    if (!tensor.has_value()) return;
    const char* op = "gram_ema_";
    check_cpu(op, name, *tensor, 1);
    check_same_dtype(op, name, *tensor, ScalarType::Float);
    const int64_t size = tensor->size(0);
    STD_TORCH_CHECK(size == 1 || size == blocks, op, ": ", name, " must have 1 or ", blocks,
                    " elements, got ", size);
    data = tensor->const_data_ptr<float>();
    stride = size == 1 ? 0 : tensor->stride(0);
  }
  Factor(const Factor&) = delete;

 private:
  float number_;

 public:
  const float* data;
  int64_t stride;
};

void gram_ema_(Tensor stat, Tensor left, Tensor grad, double beta, double alpha,
               std::optional<Tensor> beta_tensor, std::optional<Tensor> alpha_tensor) {
  const char* op = "gram_ema_";
  check_cpu(op, "stat", stat, 3);
  check_same_dtype(op, "stat", stat, ScalarType::Float);
  const int64_t blocks = stat.size(0), n = stat.size(1);
  check_size(op, "stat", stat, 2, n);
  STD_TORCH_CHECK(n <= 1 || (stat.stride(2) == 1 && stat.stride(1) >= n), op,
                  ": stat must have column stride 1 and row stride >= n, got ", stat.stride(2),
                  " and ", stat.stride(1));
  STD_TORCH_CHECK(blocks <= 1 || n == 0 || stat.stride(0) != 0, op, ": stat's blocks overlap");
  const auto left_operand = gram_operand("left", left, stat);
  const auto grad_operand = gram_operand("grad", grad, stat);
  check_size(op, "grad", grad, 1, left.size(1));
  check_size(op, "grad", grad, 3, left.size(3));
  const Factor betas("beta_tensor", beta, beta_tensor, blocks);
  const Factor alphas("alpha_tensor", alpha, alpha_tensor, blocks);
  shampoo::gram_ema({blocks, n, left.size(1), left.size(3), stat.mutable_data_ptr<float>(),
                     stat.stride(0), stat.stride(1), left_operand, grad_operand, betas.data,
                     alphas.data, betas.stride, alphas.stride},
                    torch_threads());
}

template <class T>
shampoo::SymmetricStack<T> symmetric_stack(const Tensor& A) {
  return {A.const_data_ptr<T>(), A.size(0), A.size(1), A.stride(0), A.stride(1), A.stride(2)};
}

void check_symmetric_stack(const char* op, const Tensor& A) {
  check_cpu(op, "A", A, 3);
  check_size(op, "A", A, 2, A.size(1));
  const ScalarType dtype = A.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
                  ": A must be float32 or float64");
}

Tensor eigenvalue_bound(Tensor A) {
  check_symmetric_stack("eigenvalue_bound", A);
  const int64_t blocks[] = {A.size(0)};
  Tensor bound = torch::stable::new_empty(A, {blocks, 1});
  if (A.scalar_type() == ScalarType::Float) {
    shampoo::eigenvalue_bound(symmetric_stack<float>(A), bound.mutable_data_ptr<float>(),
                              torch_threads());
  } else {
    shampoo::eigenvalue_bound(symmetric_stack<double>(A), bound.mutable_data_ptr<double>(),
                              torch_threads());
  }
  return bound;
}

template <class T>
shampoo::InverseRoot<T> inverse_root(const Tensor& A, double p, double ridge,
                                     const std::optional<Tensor>& previous, Tensor& root,
                                     Tensor& residual, Tensor& status) {
  const T* kept = previous.has_value() ? previous->const_data_ptr<T>() : nullptr;
  auto stride = [&](int dim) { return kept ? previous->stride(dim) : 0; };
  return {symmetric_stack<T>(A),
          p,
          ridge,
          kept,
          stride(0),
          stride(1),
          stride(2),
          root.mutable_data_ptr<T>(),
          residual.mutable_data_ptr<T>(),
          status.mutable_data_ptr<int8_t>()};
}

void check_inverse_root(const char* op, const Tensor& A, double p, double ridge,
                        const std::optional<Tensor>& previous, const Tensor& root,
                        const Tensor& residual, const Tensor& status) {
  check_symmetric_stack(op, A);
  const int64_t blocks = A.size(0), n = A.size(1);
  auto check_like_A = [&](const char* name, const Tensor& t) {
    check_cpu(op, name, t, 3);
    check_same_dtype(op, name, t, A.scalar_type());
    check_size(op, name, t, 0, blocks);
    check_size(op, name, t, 1, n);
    check_size(op, name, t, 2, n);
  };
  auto check_per_block = [&](const char* name, const Tensor& t, ScalarType dtype) {
    check_cpu(op, name, t, 1);
    check_same_dtype(op, name, t, dtype);
    check_size(op, name, t, 0, blocks);
    STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  };
  check_like_A("root", root);
  STD_TORCH_CHECK(root.is_contiguous(), op, ": root must be contiguous");
  if (previous.has_value()) check_like_A("previous", *previous);
  check_per_block("residual", residual, A.scalar_type());
  check_per_block("status", status, ScalarType::Char);
  STD_TORCH_CHECK(p > 0 && ridge >= 0, op, ": p must be positive, ridge must not be negative");
}

void inverse_root_eigh_(Tensor A, double p, double ridge, std::optional<double> rank_rtol,
                        std::optional<Tensor> previous, Tensor root, Tensor residual,
                        Tensor status) {
  const char* op = "inverse_root_eigh_";
  check_inverse_root(op, A, p, ridge, previous, root, residual, status);
  STD_TORCH_CHECK(!(rank_rtol.value_or(0) < 0), op, ": rank_rtol must not be negative");
  auto run = [&]<class T>(T) {
    shampoo::inverse_root_eigh<T>(inverse_root<T>(A, p, ridge, previous, root, residual, status),
                                  rank_rtol.value_or(-1), torch_threads());
  };
  A.scalar_type() == ScalarType::Float ? run(float()) : run(double());
}

// steps: (count, 3) float32, the coefficients a, b, c of every step.
void inverse_root_newton_(Tensor A, int64_t p, double ridge, Tensor steps,
                          std::optional<Tensor> previous, Tensor root, Tensor residual,
                          Tensor status) {
  const char* op = "inverse_root_newton_";
  check_inverse_root(op, A, double(p), ridge, previous, root, residual, status);
  check_same_dtype(op, "A", A, ScalarType::Float);
  check_cpu(op, "steps", steps, 2);
  check_same_dtype(op, "steps", steps, ScalarType::Float);
  check_size(op, "steps", steps, 1, 3);
  STD_TORCH_CHECK(steps.is_contiguous() && steps.size(0) >= 1, op,
                  ": steps must be contiguous and hold at least one");
  STD_TORCH_CHECK(p <= 1 << 20, op, ": p must be at most ", 1 << 20, ", got ", p);
  using Step = shampoo::NewtonSchedule::Step;
  shampoo::inverse_root_newton(
      inverse_root<float>(A, double(p), ridge, previous, root, residual, status),
      {reinterpret_cast<const Step*>(steps.const_data_ptr<float>()), steps.size(0), uint32_t(p)},
      torch_threads());
}

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
  m.def("eigenvalue_bound(Tensor A) -> Tensor");
  m.def(
      "inverse_root_eigh_(Tensor A, float p, float ridge, float? rank_rtol, Tensor? previous, "
      "Tensor(a!) root, Tensor(b!) residual, Tensor(c!) status) -> ()");
  m.def(
      "inverse_root_newton_(Tensor A, int p, float ridge, Tensor steps, Tensor? previous, "
      "Tensor(a!) root, Tensor(b!) residual, Tensor(c!) status) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("gram_ema_", TORCH_BOX(&gram_ema_));
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("eigenvalue_bound", TORCH_BOX(&eigenvalue_bound));
  m.impl("inverse_root_eigh_", TORCH_BOX(&inverse_root_eigh_));
  m.impl("inverse_root_newton_", TORCH_BOX(&inverse_root_newton_));
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native kernels of shampoo_kernels; importing it registers "
      "torch.ops.shampoo_kernels_native.";
  m.def("build_facts", &build_facts, "Compiler, torch target, instruction sets, CUDA archs.");
  m.def("isas", &shampoo::isas, "Instruction sets of the products that run here, best first.");
  m.def("isa", &shampoo::isa, "The one in use.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        if (!shampoo::set_isa(name)) {
          throw pybind11::value_error("set_isa: name must be one of isas(), got '" + name + "'");
        }
      },
      pybind11::arg("name"), "Use another one, for tests.");
  m.def(
      "peak_gflops", [] { return shampoo::peak_gflops(torch_threads()); },
      "Measured float32 FMA rate on torch's threads, for benchmarks.");
  m.def("has_lapack", &shampoo::has_lapack, "Whether inverse_root_eigh_ can run.");
}
