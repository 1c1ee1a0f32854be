// The part of cuSOLVER that is simulated, in double. Matrices are column-major; work is queued on the handle's stream.
// What NaN leads to: sim/control.h.
#pragma once

#include <cstdint>

#include "cublas_v2.h"

enum cusolverStatus_t {
  CUSOLVER_STATUS_SUCCESS = 0,
  CUSOLVER_STATUS_NOT_INITIALIZED = 1,
  CUSOLVER_STATUS_ALLOC_FAILED = 2,
  CUSOLVER_STATUS_INVALID_VALUE = 3,
  CUSOLVER_STATUS_ARCH_MISMATCH = 4,
  CUSOLVER_STATUS_MAPPING_ERROR = 5,
  CUSOLVER_STATUS_EXECUTION_FAILED = 6,
  CUSOLVER_STATUS_INTERNAL_ERROR = 7,
  CUSOLVER_STATUS_MATRIX_TYPE_NOT_SUPPORTED = 8,
  CUSOLVER_STATUS_NOT_SUPPORTED = 9,
  CUSOLVER_STATUS_INVALID_WORKSPACE = 31,
};

enum cusolverEigMode_t { CUSOLVER_EIG_MODE_NOVECTOR = 0, CUSOLVER_EIG_MODE_VECTOR = 1 };

using cusolverDnHandle_t = struct cusolverDnContext*;
using cusolverDnParams_t = struct cusolverDnParams*;

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle);
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle);
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream);
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params);
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params);

/// Cholesky factors in the triangle `uplo`; the other one is lost. info: 0, or the first pivot (from 1) that is not
/// positive. The array of pointers is in device memory.
cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* a[], int lda,
                                         int* info, int batch_size);

/// Eigenvalues in ascending order, n after n, and vectors in the columns of A, the matrices lda * n apart.
cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                   cusolverEigMode_t jobz, cublasFillMode_t uplo, std::int64_t n,
                                                   cudaDataType type_a, const void* a, std::int64_t lda,
                                                   cudaDataType type_w, const void* w, cudaDataType compute_type,
                                                   std::size_t* device_bytes, std::size_t* host_bytes,
                                                   std::int64_t batch_size);
cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                        cublasFillMode_t uplo, std::int64_t n, cudaDataType type_a, void* a,
                                        std::int64_t lda, cudaDataType type_w, void* w, cudaDataType compute_type,
                                        void* device_buffer, std::size_t device_bytes, void* host_buffer,
                                        std::size_t host_bytes, int* info, std::int64_t batch_size);

/// Householder QR: R in the upper triangle, the vectors below it, their leading 1 implied; H = I - tau v v^T.
cusolverStatus_t cusolverDnDgeqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, double* a, int lda, int* lwork);
cusolverStatus_t cusolverDnDgeqrf(cusolverDnHandle_t handle, int m, int n, double* a, int lda, double* tau,
                                  double* workspace, int lwork, int* info);

/// The first n columns of the product of k reflections, in the place of their vectors.
cusolverStatus_t cusolverDnDorgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k, const double* a, int lda,
                                             const double* tau, int* lwork);
cusolverStatus_t cusolverDnDorgqr(cusolverDnHandle_t handle, int m, int n, int k, double* a, int lda, const double* tau,
                                  double* workspace, int lwork, int* info);

namespace cuda_sim {
/// As fail_next(cudaError_t), for the functions of cuSOLVER.
void fail_next(cusolverStatus_t status, int after = 0);
}  // namespace cuda_sim
