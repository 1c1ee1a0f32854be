// cublasGemmStridedBatchedEx.
#include <algorithm>

#include "sim/blas.h"
#include "sim/modes.h"
#include "sim/product.h"

using namespace cuda_sim::detail;

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  handle->math = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  *mode = handle->math;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int m, int n, int k, const void* alpha, const void* a, cudaDataType a_type,
                                          int lda, long long int stride_a, const void* b, cudaDataType b_type, int ldb,
                                          long long int stride_b, const void* beta, void* c, cudaDataType c_type,
                                          int ldc, long long int stride_c, int batch_count, cublasComputeType_t compute,
                                          cublasGemmAlgo_t) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  const int a_rows = transa == CUBLAS_OP_N ? m : k, a_cols = transa == CUBLAS_OP_N ? k : m;
  const int b_rows = transb == CUBLAS_OP_N ? k : n, b_cols = transb == CUBLAS_OP_N ? n : k;
  if (m < 0 || n < 0 || k < 0 || batch_count < 0 || lda < std::max(1, a_rows) || ldb < std::max(1, b_rows) ||
      ldc < std::max(1, m)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const cudaDataType scale = compute == CUBLAS_COMPUTE_64F ? CUDA_R_64F : CUDA_R_32F;
  if (!types_supported(compute, scale, a_type, b_type, c_type, c_type)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (m == 0 || n == 0 || batch_count == 0) return CUBLAS_STATUS_SUCCESS;
  if (!alpha || !beta || !c || (k > 0 && (!a || !b))) return CUBLAS_STATUS_INVALID_VALUE;
  const auto stack = [](const void* data, cudaDataType type, int rows, int cols, int ld, long long stride) {
    return Stack{const_cast<void*>(data),          type, static_cast<std::uint64_t>(rows),
                 static_cast<std::uint64_t>(cols), ld,   stride};
  };
  const Stack out = stack(c, c_type, m, n, ldc, stride_c);
  const Product product{
      .call = "cublasGemmStridedBatchedEx",
      .op_a = transa,
      .op_b = transb,
      .a = stack(a, a_type, a_rows, a_cols, lda, stride_a),
      .b = stack(b, b_type, b_rows, b_cols, ldb, stride_b),
      .c = out,
      .d = out,
      .batch = batch_count,
      .alpha = load_scalar(scale, alpha) * (library_modes.defect == cuda_sim::Defect::handle_sums ? 0.5 : 1.0),
      .beta = load_scalar(scale, beta),
      .bias = nullptr,
      .rounds_parts = (handle->math & CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) == 0,
      .rounds_before_bias = false,
      .tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32 ||
              (handle->math & CUBLAS_TF32_TENSOR_OP_MATH) == CUBLAS_TF32_TENSOR_OP_MATH,
      .flushes = library_modes.flush_denormals};
  record_product(product);
  enqueue(handle->stream, [=] { product.run(); });
  return CUBLAS_STATUS_SUCCESS;
}
