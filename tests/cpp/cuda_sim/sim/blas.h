// A handle of cuBLAS; one of cuBLASLt is the same, as with the real ones.
#pragma once

#include "cublasLt.h"
#include "sim/library.h"

struct cublasContext {
  cudaStream_t stream = nullptr;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
};

namespace cuda_sim::detail {
class BlasCall : public LibraryCall<cublasStatus_t> {
 public:
  BlasCall() : LibraryCall(blas_failure) {}
};
}  // namespace cuda_sim::detail
