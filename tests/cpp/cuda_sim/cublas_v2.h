// The part of cuBLAS that is simulated. Matrices are column-major; work is queued on the handle's stream.
#pragma once

#include "cuda_runtime_api.h"
#include "library_types.h"

enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_NOT_INITIALIZED = 1,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_ARCH_MISMATCH = 8,
  CUBLAS_STATUS_EXECUTION_FAILED = 13,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
};

// One of each of these is all that our code uses.
enum cublasFillMode_t { CUBLAS_FILL_MODE_UPPER = 1 };
enum cublasDiagType_t { CUBLAS_DIAG_NON_UNIT = 0 };
enum cublasSideMode_t { CUBLAS_SIDE_RIGHT = 1 };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };

enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };

enum cublasComputeType_t {
  CUBLAS_COMPUTE_32F = 68,
  CUBLAS_COMPUTE_64F = 70,
  CUBLAS_COMPUTE_32F_FAST_TF32 = 77,
};

enum cublasMath_t {
  CUBLAS_DEFAULT_MATH = 0,
  CUBLAS_PEDANTIC_MATH = 2,
  CUBLAS_TF32_TENSOR_OP_MATH = 3,
  CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16,
};

using cublasHandle_t = struct cublasContext*;

const char* cublasGetStatusName(cublasStatus_t status);

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle);
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream);

/// Whether parts of a sum may be added in the type of an output that is smaller than f32: they are, unless the mode
/// disallows it; and whether f32 is multiplied in TF32. It holds for cublasGemmStridedBatchedEx.
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode);
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode);

/// C = alpha op(A) op(B) + beta C, op(A) [m, k], op(B) [k, n], at any alignment of elements; the matrices of a batch
/// are `stride` elements apart. alpha and beta are on the host, in the compute type. How exactly: sim/product.h.
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int m, int n, int k, const void* alpha, const void* A, cudaDataType Atype,
                                          int lda, long long int strideA, const void* B, cudaDataType Btype, int ldb,
                                          long long int strideB, const void* beta, void* C, cudaDataType Ctype, int ldc,
                                          long long int strideC, int batchCount, cublasComputeType_t computeType,
                                          cublasGemmAlgo_t algo);

/// X A = alpha B, A upper triangular, X in the place of B; the arrays of pointers are in device memory.
cublasStatus_t cublasDtrsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,
                                  cublasOperation_t op, cublasDiagType_t diag, int m, int n, const double* alpha,
                                  const double* const a[], int lda, double* const b[], int ldb, int batch_count);

#define cublasCreate cublasCreate_v2
#define cublasSetStream cublasSetStream_v2

namespace cuda_sim {
/// As fail_next(cudaError_t), for the functions of cuBLAS and cuBLASLt.
void fail_next(cublasStatus_t status, int after = 0);
}  // namespace cuda_sim
