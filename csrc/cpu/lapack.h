// LAPACK from the process we are loaded into: libtorch_cpu exports it where it was built with MKL.
#pragma once

#include <cstdint>

extern "C" {
// Weak: null where the process has none. 32-bit integers, as in torch's MKL.
__attribute__((weak)) void ssyevd_(const char* job, const char* triangle, const int* n, float* a,
                                   const int* lda, float* w, float* work, const int* lwork,
                                   int* iwork, const int* liwork, int* info);
__attribute__((weak)) void dsyevd_(const char* job, const char* triangle, const int* n, double* a,
                                   const int* lda, double* w, double* work, const int* lwork,
                                   int* iwork, const int* liwork, int* info);
__attribute__((weak)) void sgeqrf_(const int* m, const int* n, float* a, const int* lda, float* tau,
                                   float* work, const int* lwork, int* info);
__attribute__((weak)) void dgeqrf_(const int* m, const int* n, double* a, const int* lda,
                                   double* tau, double* work, const int* lwork, int* info);
__attribute__((weak)) void sorgqr_(const int* m, const int* n, const int* k, float* a,
                                   const int* lda, const float* tau, float* work, const int* lwork,
                                   int* info);
__attribute__((weak)) void dorgqr_(const int* m, const int* n, const int* k, double* a,
                                   const int* lda, const double* tau, double* work,
                                   const int* lwork, int* info);
// Takes an int; the lower-case form is Fortran's and takes a pointer. Returns the former setting.
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
}

namespace shampoo {

// Eigenvalues (ascending) and eigenvectors of a symmetric matrix; info as in LAPACK.
template <class T>
inline int syevd(char triangle, int n, T* a, int lda, T* w, T* work, int lwork, int* iwork,
                 int liwork) {
  int info = 0;
  if constexpr (sizeof(T) == 4) {
    ssyevd_("V", &triangle, &n, a, &lda, w, work, &lwork, iwork, &liwork, &info);
  } else {
    dsyevd_("V", &triangle, &n, a, &lda, w, work, &lwork, iwork, &liwork, &info);
  }
  return info;
}

// a (n, n), column-major, becomes its Q factor, sign[j] that of R's diagonal (1 for 0); `work`
// holds lwork >= n numbers. Returns info as in LAPACK.
template <class T>
inline int qr(int n, T* a, T* tau, T* sign, T* work, int lwork) {
  int info = 0;
  auto factor = [&](auto* geqrf, auto* orgqr) {
    geqrf(&n, &n, a, &n, tau, work, &lwork, &info);
    if (info != 0) return;
    for (int j = 0; j < n; ++j) sign[j] = a[j + int64_t{j} * n] < 0 ? T{-1} : T{1};
    orgqr(&n, &n, &n, a, &n, tau, work, &lwork, &info);
  };
  if constexpr (sizeof(T) == 4) {
    factor(sgeqrf_, sorgqr_);
  } else {
    factor(dgeqrf_, dorgqr_);
  }
  return info;
}

// One MKL thread for the calling thread while this lives: several would change the bits of a block
// with the number of threads, and we already run a block on every core.
class SingleThreadedMkl {
 public:
  SingleThreadedMkl() {
    if (MKL_Set_Num_Threads_Local) former_ = MKL_Set_Num_Threads_Local(1);
  }
  ~SingleThreadedMkl() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(former_);
  }
  SingleThreadedMkl(const SingleThreadedMkl&) = delete;
  SingleThreadedMkl& operator=(const SingleThreadedMkl&) = delete;

 private:
  int former_ = 0;
};

}  // namespace shampoo
