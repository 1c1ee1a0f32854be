#include "sim/blas.h"

#include <algorithm>

namespace cuda_sim {

void fail_next(cublasStatus_t status, int after) { detail::blas_failure.arm(status, after); }

namespace detail {
namespace {

/// A triangular matrix as the solver sees it: `lower` after transposition.
struct Triangle {
  const double* a;
  int ld;
  int size;
  bool transposed;
  bool lower;
  bool unit;

  double operator()(int i, int j) const {
    return transposed ? a[j + static_cast<std::ptrdiff_t>(i) * ld] : a[i + static_cast<std::ptrdiff_t>(j) * ld];
  }

  /// x = inverse * x, by substitution.
  void solve(double* x, std::ptrdiff_t stride) const {
    for (int step = 0; step < size; ++step) {
      const int i = lower ? step : size - 1 - step;
      double value = x[i * stride];
      for (int done = 0; done < step; ++done) {
        const int j = lower ? done : size - 1 - done;
        value -= (*this)(i, j) * x[j * stride];
      }
      x[i * stride] = unit ? value : value / (*this)(i, i);
    }
  }
};

}  // namespace
}  // namespace detail
}  // namespace cuda_sim

using namespace cuda_sim::detail;

const char* cublasGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_MAPPING_ERROR:
      return "CUBLAS_STATUS_MAPPING_ERROR";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_LICENSE_ERROR:
      return "CUBLAS_STATUS_LICENSE_ERROR";
  }
  return "<unknown>";
}

const char* cublasGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "the library function has failed";
}

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (!handle) return CUBLAS_STATUS_INVALID_VALUE;
  *handle = new cublasContext;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
  delete handle;
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

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* stream) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  if (!stream) return CUBLAS_STATUS_INVALID_VALUE;
  *stream = handle->stream;
  return CUBLAS_STATUS_SUCCESS;
}

// Nothing that is simulated uses the handle's workspace, but it must be one.
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, std::size_t bytes) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  const bool aligned = reinterpret_cast<std::uintptr_t>(workspace) % 256 == 0;
  return bytes == 0 || (aligned && is_allocated(workspace, bytes)) ? CUBLAS_STATUS_SUCCESS
                                                                   : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  return mode == CUBLAS_POINTER_MODE_HOST ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasDtrsmBatched(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t uplo,
                                  cublasOperation_t op, cublasDiagType_t diag, int m, int n, const double* alpha,
                                  const double* const a[], int lda, double* const b[], int ldb, int batch_count) {
  const BlasCall call;
  if (call.failed()) return call.status();
  if (const cublasStatus_t status = check_handle(handle)) return status;
  const bool left = side == CUBLAS_SIDE_LEFT;
  const int size = left ? m : n;
  if (m < 0 || n < 0 || batch_count < 0 || lda < std::max(1, size) || ldb < std::max(1, m) || !alpha ||
      uplo == CUBLAS_FILL_MODE_FULL) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (m == 0 || n == 0 || batch_count == 0) return CUBLAS_STATUS_SUCCESS;
  // X op(A) = B is op(A)^T X^T = B^T: rows of B are solved for as columns are, with the matrix transposed once more.
  const bool transposed = (op != CUBLAS_OP_N) == left;
  const bool lower = (uplo == CUBLAS_FILL_MODE_LOWER) != transposed;
  record({.kind = Kind::library,
          .name = "cublasDtrsmBatched",
          .type = Type::f64,
          .m = m,
          .n = n,
          .batch = batch_count,
          .flops = batch_count * trsm_flops(size, left ? n : m),
          .bytes = batch_count * 8.0 * (triangle_elements(size) + 2.0 * m * n)});
  enqueue(handle->stream, [=, scale = *alpha] {
    const auto count = static_cast<std::size_t>(batch_count);
    require_allocated(a, count * sizeof(*a), "cublasDtrsmBatched: array of A");
    require_allocated(b, count * sizeof(*b), "cublasDtrsmBatched: array of B");
    for (int i = 0; i < batch_count; ++i) {
      const auto triangle_size = static_cast<std::size_t>(size);
      require_allocated(a[i], extent(triangle_size, triangle_size, lda, 8), "cublasDtrsmBatched: A");
      require_allocated(b[i], extent(m, n, ldb, 8), "cublasDtrsmBatched: B");
      const Triangle triangle{a[i], lda, size, transposed, lower, diag == CUBLAS_DIAG_UNIT};
      for (int column = 0; column < n; ++column) {
        for (int row = 0; row < m; ++row) b[i][row + static_cast<std::ptrdiff_t>(column) * ldb] *= scale;
      }
      for (int vector = 0; vector < (left ? n : m); ++vector) {
        if (left) {
          triangle.solve(b[i] + static_cast<std::ptrdiff_t>(vector) * ldb, 1);
        } else {
          triangle.solve(b[i] + vector, ldb);
        }
      }
    }
  });
  return CUBLAS_STATUS_SUCCESS;
}
