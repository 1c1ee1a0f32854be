// A handle of cuBLAS; one of cuBLASLt is the same, as with the real ones.
#pragma once

#include "cublasLt.h"
#include "sim/library.h"

struct cublasContext {
  const int device = cuda_sim::detail::current_device();
  cudaStream_t stream = nullptr;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
};

namespace cuda_sim::detail {
/// What a function has to return first: a handle is for the device that was current when it was made.
inline cublasStatus_t check_handle(cublasHandle_t handle) {
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  return handle->device == current_device() ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

class BlasCall : public LibraryCall<cublasStatus_t> {
 public:
  BlasCall() : LibraryCall(blas_failure) {}
};
}  // namespace cuda_sim::detail
