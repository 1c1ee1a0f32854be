// The part of cuSOLVER that is simulated, in double. Matrices are column-major; work is queued on the handle's stream.
// What NaN leads to: sim/control.h.
#pragma once

#include <cstdint>

#include "cublas_v2.h"

enum cusolverStatus_t {
  CUSOLVER_STATUS_SUCCESS = 0,
  CUSOLVER_STATUS_NOT_INITIALIZED = 1,
  CUSOLVER_STATUS_INVALID_VALUE = 3,
  CUSOLVER_STATUS_EXECUTION_FAILED = 6,
  CUSOLVER_STATUS_INTERNAL_ERROR = 7,
};

using cusolverDnHandle_t = struct cusolverDnContext*;

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle);
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream);

/// Cholesky factors in the upper triangle; the other one is lost. info: 0, or the first pivot (from 1) that is not
/// positive. The array of pointers is in device memory.
cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* a[], int lda,
                                         int* info, int batch_size);

/// Householder QR: R in the upper triangle, the vectors below it, their leading 1 implied; H = I - tau v v^T.
cusolverStatus_t cusolverDnDgeqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, double* a, int lda, int* lwork);
cusolverStatus_t cusolverDnDgeqrf(cusolverDnHandle_t handle, int m, int n, double* a, int lda, double* tau,
                                  double* workspace, int lwork, int* info);

/// The product of n reflections, as many columns, in the place of their vectors: k must be n.
cusolverStatus_t cusolverDnDorgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k, const double* a, int lda,
                                             const double* tau, int* lwork);
cusolverStatus_t cusolverDnDorgqr(cusolverDnHandle_t handle, int m, int n, int k, double* a, int lda, const double* tau,
                                  double* workspace, int lwork, int* info);

namespace cuda_sim {
/// As fail_next(cudaError_t), for the functions of cuSOLVER.
void fail_next(cusolverStatus_t status, int after = 0);
}  // namespace cuda_sim
