// gram_ema_, product_ and precondition_ on a CPU.
#include "bindings.h"

namespace {

using shampoo::check_cpu;
using shampoo::check_same_dtype;
using shampoo::check_size;
using shampoo::DType;
using shampoo::torch_threads;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

shampoo::Operand matrices(const char* op, const char* name, const Tensor& t) {
  return {t.const_data_ptr(), product_dtype(op, name, t), t.stride(0), 0, t.stride(1), t.stride(2)};
}

// (blocks, slabs, rows, k), or (blocks, rows, k) with one slab.
shampoo::Operand gram_operand(const char* name, const Tensor& t, const Tensor& stat) {
  const char* op = "gram_ema_";
  const bool one_slab = t.dim() == 3;
  check_cpu(op, name, t, one_slab ? 3 : 4);
  check_size(op, name, t, 0, stat.size(0));
  check_size(op, name, t, one_slab ? 1 : 2, stat.size(1));
  if (one_slab) return matrices(op, name, t);
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
                    matrices(op, "left", left),
                    {right.const_data_ptr(), product_dtype(op, "right", right), right.stride(0), 0,
                     right.stride(2), right.stride(1)},
                    float(identity),
                    float(beta),
                    float(alpha)},
                   torch_threads());
}

// out <- left @ grad @ right, none being the identity, and at least one there; returns the squared
// norms.
Tensor precondition_(Tensor out, Tensor grad, std::optional<Tensor> left,
                     std::optional<Tensor> right) {
  const char* op = "precondition_";
  check_cpu(op, "out", out, 3);
  const int64_t blocks = out.size(0), rows = out.size(1), columns = out.size(2);
  auto operand = [&](const char* name, const std::optional<Tensor>& t, int64_t size1,
                     int64_t size2) -> shampoo::Operand {
    if (!t.has_value()) return {nullptr, DType::kFloat32, 0, 0, 0, 0};
    check_cpu(op, name, *t, 3);
    check_size(op, name, *t, 0, blocks);
    check_size(op, name, *t, 1, size1);
    check_size(op, name, *t, 2, size2);
    return matrices(op, name, *t);
  };
  check_rows(op, "out", out);
  STD_TORCH_CHECK(blocks <= 1 || rows * columns == 0 || out.stride(0) != 0, op,
                  ": out's blocks overlap");
  STD_TORCH_CHECK(left.has_value() || right.has_value(), op, ": one factor at least");
  const int64_t shape[] = {blocks};
  Tensor norms = torch::stable::new_empty(out, {shape, 1});
  shampoo::precondition(
      {blocks, rows, columns, out.mutable_data_ptr<float>(), out.stride(0), out.stride(1),
       operand("grad", grad, rows, columns), operand("left", left, rows, rows),
       operand("right", right, columns, columns), norms.mutable_data_ptr<float>()},
      torch_threads());
  return norms;
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
  const bool one_slab = left.dim() == 3;
  const int64_t slabs = one_slab ? 1 : left.size(1), k = left.size(one_slab ? 2 : 3);
  check_cpu(op, "grad", grad, left.dim());
  if (!one_slab) check_size(op, "grad", grad, 1, slabs);
  check_size(op, "grad", grad, one_slab ? 2 : 3, k);
  const Factor betas("beta_tensor", beta, beta_tensor, blocks);
  const Factor alphas("alpha_tensor", alpha, alpha_tensor, blocks);
  shampoo::gram_ema(
      {blocks, n, slabs, k, stat.mutable_data_ptr<float>(), stat.stride(0), stat.stride(1),
       left_operand, grad_operand, betas.data, alphas.data, betas.stride, alphas.stride},
      torch_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(shampoo_kernels_native, CPU, m) {
  m.impl("gram_ema_", TORCH_BOX(&gram_ema_));
  m.impl("product_", TORCH_BOX(&product_));
  m.impl("precondition_", TORCH_BOX(&precondition_));
}
