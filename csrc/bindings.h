// What the bindings have in common: torch's threads, and the checks that memory safety needs, since
// the ops can be called directly. The Python side validates with messages for people.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "kernels.h"

namespace shampoo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's thread pool.
inline Parallel torch_threads() {
  return {int64_t{torch::stable::get_num_threads()},
          [](int64_t workers, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
            });
          }};
}

inline void check_cpu(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const char* op, const char* name, const Tensor& t, int64_t dim,
                       int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, op, ": ", name, " must have size ", size, " in dimension ",
                  dim, ", got ", t.size(dim));
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
}

template <class T>
SymmetricStack<T> symmetric_stack(const Tensor& A) {
  return {A.const_data_ptr<T>(), A.size(0), A.size(1), A.stride(0), A.stride(1), A.stride(2)};
}

}  // namespace shampoo
