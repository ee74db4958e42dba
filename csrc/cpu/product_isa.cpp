// Which instruction set the product uses.
#include "product_isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace shampoo {
namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports("f16c") is gcc's alone: clang refuses the name.
bool supports_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}
#endif

// Best first.
std::vector<const ProductIsa*> runnable() {
  std::vector<const ProductIsa*> list;
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) list.push_back(&product_avx512);
  if (avx2) list.push_back(&product_avx2);
#endif
  list.push_back(&product_portable);
  list.push_back(&product_avx512_generic);
  return list;
}

std::atomic<const ProductIsa*>& current() {
  static std::atomic<const ProductIsa*> isa{runnable().front()};
  return isa;
}

}  // namespace

const ProductIsa& current_product_isa() {
  return *current().load(std::memory_order_relaxed);
}

bool runs_bf16_pairs(const ProductIsa& isa) {
  if (isa.bf16_pairs.update_full == nullptr) return false;
#if defined(__x86_64__)
  if (&isa == &product_avx512) return __builtin_cpu_supports("avx512bf16");
#endif
  return true;
}

std::vector<std::string> built_isas() {
#if defined(__x86_64__)
  return {product_avx512.name, product_avx2.name, product_portable.name,
          product_avx512_generic.name};
#else
  return {product_portable.name, product_avx512_generic.name};
#endif
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const ProductIsa* isa : runnable()) names.push_back(isa->name);
  return names;
}

std::string isa() {
  return current_product_isa().name;
}

bool multiplies_bf16() {
  return runs_bf16_pairs(current_product_isa());
}

bool set_isa(const std::string& name) {
  for (const ProductIsa* isa : runnable()) {
    if (isa->name == name) {
      current().store(isa, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace shampoo
