#include "sim/blas.h"

#include <algorithm>

#include "sim/modes.h"

namespace cuda_sim {

detail::LibraryModes detail::library_modes;

void set_flush_denormals(bool flush) { detail::library_modes.flush_denormals = flush; }
void set_no_algorithm_below(std::uint32_t bytes, NoAlgorithm how) {
  detail::library_modes.no_algorithm_below = bytes;
  detail::library_modes.no_algorithm = how;
}
void set_no_algorithm_for(std::uint64_t m, NoAlgorithm how) {
  detail::library_modes.no_algorithm_for = m;
  detail::library_modes.no_algorithm = how;
}
void set_solver_on_nan(OnNaN mode) { detail::library_modes.solver_on_nan = mode; }
void set_defect(Defect defect) { detail::library_modes.defect = defect; }
void reset_libraries() { detail::library_modes = {}; }

void fail_next(cublasStatus_t status, int after) { detail::blas_failure.arm(status, after); }

}  // namespace cuda_sim

using namespace cuda_sim::detail;

const char* cublasGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
  }
  return "<unknown>";
}

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  const BlasCall call;
  if (call.failed()) return call.status();
  *handle = new cublasContext;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  if (!is_stream(stream) || device_of(stream) != handle->device) return CUBLAS_STATUS_INVALID_VALUE;
  handle->stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDtrsmBatched(cublasHandle_t handle, cublasSideMode_t, cublasFillMode_t, cublasOperation_t op,
                                  cublasDiagType_t, int m, int n, const double* alpha, const double* const a[], int lda,
                                  double* const b[], int ldb, int batch_count) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  if (op != CUBLAS_OP_N) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (m < 0 || n < 0 || batch_count < 0 || lda < std::max(1, n) || ldb < std::max(1, m) || !alpha) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (m == 0 || n == 0 || batch_count == 0) return CUBLAS_STATUS_SUCCESS;
  record({.kind = Kind::library,
          .name = "cublasDtrsmBatched",
          .type = Type::f64,
          .m = m,
          .n = n,
          .batch = batch_count,
          .flops = batch_count * trsm_flops(n, m)});
  enqueue(handle->stream, [=, scale = *alpha] {
    const auto count = static_cast<std::size_t>(batch_count);
    require_allocated(a, count * sizeof(*a), "cublasDtrsmBatched: array of A");
    require_allocated(b, count * sizeof(*b), "cublasDtrsmBatched: array of B");
    for (int z = 0; z < batch_count; ++z) {
      require_allocated(a[z], extent(n, n, lda, 8), "cublasDtrsmBatched: A");
      require_allocated(b[z], extent(m, n, ldb, 8), "cublasDtrsmBatched: B");
      for (std::ptrdiff_t i = 0; i < m; ++i) {
        for (std::ptrdiff_t j = 0; j < n; ++j) {
          double value = scale * b[z][i + j * ldb];
          for (std::ptrdiff_t p = 0; p < j; ++p) value -= b[z][i + p * ldb] * a[z][p + j * lda];
          b[z][i + j * ldb] = value / a[z][j + j * lda];
        }
      }
    }
  });
  return CUBLAS_STATUS_SUCCESS;
}
