#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cusolverDn.h"
#include "sim/library.h"
#include "sim/modes.h"

struct cusolverDnContext {
  const int device = cuda_sim::detail::current_device();
  cudaStream_t stream = nullptr;
};
struct cusolverDnParams {};

namespace cuda_sim {

void fail_next(cusolverStatus_t status, int after) { detail::solver_failure.arm(status, after); }

namespace detail {
namespace {

class SolverCall : public LibraryCall<cusolverStatus_t> {
 public:
  SolverCall() : LibraryCall(solver_failure) {}
};

/// What a function has to return first: a handle is for the device that was current when it was made.
cusolverStatus_t check_handle(cusolverDnHandle_t handle) {
  if (!handle) return CUSOLVER_STATUS_NOT_INITIALIZED;
  return handle->device == current_device() ? CUSOLVER_STATUS_SUCCESS : CUSOLVER_STATUS_EXECUTION_FAILED;
}

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// A column-major matrix.
struct View {
  double* data;
  std::ptrdiff_t ld;
  double& operator()(int i, int j) const { return data[i + j * ld]; }
  double* column(int j) const { return data + j * ld; }
};

/// The lower triangle of a matrix of which one triangle is stored.
struct Symmetric {
  View a;
  bool upper;
  double& operator()(int i, int j) const { return upper ? a(j, i) : a(i, j); }
  double& other(int i, int j) const { return upper ? a(i, j) : a(j, i); }
};

bool has_nan(const double* first, int count) {
  return std::any_of(first, first + count, [](double value) { return std::isnan(value); });
}

bool has_nan(const Symmetric& a, int n) {
  for (int j = 0; j < n; ++j) {
    for (int i = j; i < n; ++i) {
      if (std::isnan(a(i, j))) return true;
    }
  }
  return false;
}

/// Returns the first pivot that is not positive, from 1, or 0. NaN is such a pivot or, where it `passes`, none.
int cholesky(const Symmetric& a, int n, bool nan_passes) {
  for (int j = 0; j < n; ++j) {
    double pivot = a(j, j);
    for (int k = 0; k < j; ++k) pivot -= a(j, k) * a(j, k);
    if (pivot <= 0 || (std::isnan(pivot) && !nan_passes)) return j + 1;
    const double root = std::sqrt(pivot);
    a(j, j) = root;
    for (int i = j + 1; i < n; ++i) {
      double value = a(i, j);
      for (int k = 0; k < j; ++k) value -= a(i, k) * a(j, k);
      a(i, j) = value / root;
    }
  }
  return 0;
}

/// Rows or columns p and q, `stride` apart within: p' = c p - s q, q' = s p + c q.
void rotate(double* p, double* q, std::ptrdiff_t stride, int n, double c, double s) {
  for (std::ptrdiff_t i = 0; i < n * stride; i += stride) {
    const double old = p[i];
    p[i] = c * old - s * q[i];
    q[i] = s * old + c * q[i];
  }
}

/// Jacobi's method on a full symmetric matrix, which becomes diagonal; the columns of `vectors` turn along. Small and
/// as accurate as can be, which is all that is asked of it here. False if that fails.
bool jacobi(const View& a, const View& vectors, int n) {
  double norm = 0;
  for (int j = 0; j < n; ++j) {
    for (int i = 0; i < n; ++i) norm = std::hypot(norm, a(i, j));
  }
  if (!std::isfinite(norm)) return false;
  bool turned = true;
  for (int sweep = 0; turned && sweep < 60; ++sweep) {  // each about doubles the digits: ten are many
    turned = false;
    for (int p = 0; p < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        const double apq = a(p, q);
        if (std::fabs(apq) <= 0x1p-55 * norm) continue;
        turned = true;
        const double theta = (a(q, q) - a(p, p)) / (2 * apq);
        const double t = std::copysign(1.0, theta) / (std::fabs(theta) + std::hypot(theta, 1.0));
        const double c = 1 / std::hypot(t, 1.0);
        rotate(a.column(p), a.column(q), 1, n, c, t * c);
        rotate(&a(p, 0), &a(q, 0), a.ld, n, c, t * c);
        rotate(vectors.column(p), vectors.column(q), 1, n, c, t * c);
        a(p, q) = a(q, p) = 0;  // but for roundoff, which would be turned again
      }
    }
  }
  return !turned;
}

/// The eigenvalues in ascending order to `values`, the vectors to the columns of `a`; returns LAPACK's info.
int eigen(const View& a, bool upper, bool want_vectors, int n, double* values) {
  std::vector<double> full_data(static_cast<std::size_t>(n) * n), vectors_data(full_data.size(), 0.0);
  const View full{full_data.data(), n}, vectors{vectors_data.data(), n};
  const Symmetric stored{a, upper};
  for (int j = 0; j < n; ++j) {
    for (int i = j; i < n; ++i) full(i, j) = full(j, i) = stored(i, j);
    vectors(j, j) = 1;
  }
  const int info = jacobi(full, vectors, n) ? 0 : 1;
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (info == 0) std::sort(order.begin(), order.end(), [&](int i, int j) { return full(i, i) < full(j, j); });
  for (int j = 0; j < n; ++j) {
    values[j] = info == 0 ? full(order[j], order[j]) : kNaN;
    for (int i = 0; i < n; ++i) a(i, j) = info == 0 && want_vectors ? vectors(i, order[j]) : kNaN;
  }
  return info;
}

/// Applies I - tau v v^T to columns of a from `first`, v in column `j` from row `j` with its leading 1 implied.
void reflect(const View& a, int m, int j, double tau, int first, int last) {
  for (int column = first; column < last; ++column) {
    double dot = a(j, column);
    for (int i = j + 1; i < m; ++i) dot += a(i, j) * a(i, column);
    a(j, column) -= tau * dot;
    for (int i = j + 1; i < m; ++i) a(i, column) -= tau * dot * a(i, j);
  }
}

void householder_qr(const View& a, int m, int n, double* tau) {
  for (int j = 0; j < std::min(m, n); ++j) {
    double rest = 0;
    for (int i = j + 1; i < m; ++i) rest = std::hypot(rest, a(i, j));
    tau[j] = 0;
    if (rest == 0) continue;
    const double alpha = a(j, j);
    const double beta = -std::copysign(std::hypot(alpha, rest), alpha);
    tau[j] = (beta - alpha) / beta;
    for (int i = j + 1; i < m; ++i) a(i, j) /= alpha - beta;
    reflect(a, m, j, tau[j], j + 1, n);
    a(j, j) = beta;
  }
}

void form_q(const View& a, int m, int n, int k, const double* tau) {
  for (int j = k; j < n; ++j) {
    for (int i = 0; i < m; ++i) a(i, j) = i == j;
  }
  for (int j = k - 1; j >= 0; --j) {
    reflect(a, m, j, tau[j], j + 1, n);
    for (int i = 0; i < j; ++i) a(i, j) = 0;
    for (int i = j + 1; i < m; ++i) a(i, j) *= -tau[j];
    a(j, j) = 1 - tau[j];
  }
}

// What is asked of callers' workspace: not needed, but large enough to be missed.
int qr_workspace(int n) { return 32 * n + 64; }
std::size_t eigen_workspace(std::int64_t n, std::int64_t batch) {
  return static_cast<std::size_t>((2 * n * n + n) * batch) * sizeof(double);
}
constexpr std::size_t kEigenHostBytes = 256;

/// Queues work on matrices, as a struct: `require_memory()` says that all it touches is allocated, `has_nan()` looks at
/// what it reads, `solve()` does it. What a call returns is known when it returns, before its work has run; so where a
/// status depends on the data, what makes the data has to run first.
template <class Work>
cusolverStatus_t submit(cudaStream_t stream, const Work& work) {
  const OnNaN on_nan = library_modes.solver_on_nan;
  if (!is_dry() && (on_nan == OnNaN::status_invalid_value || on_nan == OnNaN::status_execution_failed)) {
    run_queued(stream);
    const DeviceOpen open(device_of(stream));
    work.require_memory();
    if (work.has_nan()) {
      return on_nan == OnNaN::status_invalid_value ? CUSOLVER_STATUS_INVALID_VALUE : CUSOLVER_STATUS_EXECUTION_FAILED;
    }
  }
  enqueue(stream, [work] {
    work.require_memory();
    work.solve();
  });
  return CUSOLVER_STATUS_SUCCESS;
}

bool nan_passes() { return library_modes.solver_on_nan == OnNaN::info_zero; }

struct Potrf {
  bool upper;
  int n;
  double* const* a;
  int lda;
  int* info;
  int count;
  bool nan_passes;

  Symmetric matrix(int k) const { return {{a[k], lda}, upper}; }
  void require_memory() const {
    require_allocated(a, count * sizeof(*a), "cusolverDnDpotrfBatched: array of A");
    require_allocated(info, count * sizeof(*info), "cusolverDnDpotrfBatched: info");
    for (int k = 0; k < count; ++k) require_allocated(a[k], extent(n, n, lda, 8), "cusolverDnDpotrfBatched: A");
  }
  bool has_nan() const {
    for (int k = 0; k < count; ++k) {
      if (detail::has_nan(matrix(k), n)) return true;
    }
    return false;
  }
  void solve() const {
    for (int k = 0; k < count; ++k) {
      info[k] = cholesky(matrix(k), n, nan_passes);
      for (int j = 0; j < n; ++j) {
        for (int i = j + 1; i < n; ++i) matrix(k).other(i, j) = kNaN;  // workspace to the real one
      }
    }
  }
};

struct Syev {
  bool want_vectors, upper;
  std::int64_t n;
  double* a;
  std::int64_t lda;
  double* w;
  void* device_buffer;
  std::size_t device_bytes;
  void* host_buffer;
  std::size_t host_bytes;
  int* info;
  std::int64_t count;
  bool nan_passes;

  View matrix(std::int64_t k) const { return {a + k * lda * n, lda}; }
  bool has_nan(std::int64_t k) const { return detail::has_nan({matrix(k), upper}, static_cast<int>(n)); }
  void require_memory() const {
    require_allocated(a, (count - 1) * lda * n * 8 + extent(n, n, lda, 8), "cusolverDnXsyevBatched: A");
    require_allocated(w, count * n * 8, "cusolverDnXsyevBatched: W");
    require_allocated(info, count * sizeof(*info), "cusolverDnXsyevBatched: info");
  }
  bool has_nan() const {
    for (std::int64_t k = 0; k < count; ++k) {
      if (has_nan(k)) return true;
    }
    return false;
  }
  void solve() const {
    std::memset(host_buffer, 0xff, host_bytes);  // in use until the stream has come this far
    spoil(device_buffer, device_bytes, "cusolverDnXsyevBatched: workspace");
    for (std::int64_t k = 0; k < count; ++k) {
      const bool passes = nan_passes && has_nan(k);  // asked before the vectors are in its place
      const int failed = eigen(matrix(k), upper, want_vectors, static_cast<int>(n), w + k * n);
      info[k] = passes ? 0 : failed;
    }
  }
};

struct Geqrf {
  int m, n;
  double* a;
  int lda;
  double *tau, *workspace;
  int lwork;
  int* info;

  void require_memory() const {
    require_allocated(info, sizeof(*info), "cusolverDnDgeqrf: info");
    require_allocated(a, extent(m, n, lda, 8), "cusolverDnDgeqrf: A");
    require_allocated(tau, static_cast<std::size_t>(std::min(m, n)) * 8, "cusolverDnDgeqrf: tau");
  }
  bool has_nan() const {
    for (int j = 0; j < n; ++j) {
      if (detail::has_nan(View{a, lda}.column(j), m)) return true;
    }
    return false;
  }
  void solve() const {
    spoil(workspace, static_cast<std::size_t>(lwork) * 8, "cusolverDnDgeqrf: workspace");
    householder_qr({a, lda}, m, n, tau);
    *info = 0;
  }
};

struct Orgqr {
  int m, n, k;
  double* a;
  int lda;
  const double* tau;
  double* workspace;
  int lwork;
  int* info;

  void require_memory() const {
    require_allocated(info, sizeof(*info), "cusolverDnDorgqr: info");
    require_allocated(a, extent(m, n, lda, 8), "cusolverDnDorgqr: A");
    require_allocated(tau, static_cast<std::size_t>(k) * 8, "cusolverDnDorgqr: tau");
  }
  /// Of the vectors of the reflections: what lies above them is not read.
  bool has_nan() const {
    for (int j = 0; j < k; ++j) {
      if (detail::has_nan(View{a, lda}.column(j) + j + 1, m - j - 1)) return true;
    }
    return detail::has_nan(tau, k);
  }
  void solve() const {
    spoil(workspace, static_cast<std::size_t>(lwork) * 8, "cusolverDnDorgqr: workspace");
    form_q({a, lda}, m, n, k, tau);
    *info = 0;
  }
};

bool eigen_arguments(cusolverEigMode_t jobz, std::int64_t n, std::int64_t lda, std::int64_t batch) {
  return (jobz == CUSOLVER_EIG_MODE_NOVECTOR || jobz == CUSOLVER_EIG_MODE_VECTOR) && n >= 0 && batch >= 0 &&
         lda >= std::max<std::int64_t>(1, n);
}

}  // namespace
}  // namespace detail
}  // namespace cuda_sim

using namespace cuda_sim::detail;

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  const SolverCall call;
  if (call.failed()) return call.status();
  *handle = new cusolverDnContext;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) {
  delete handle;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (!is_stream(stream) || device_of(stream) != handle->device) return CUSOLVER_STATUS_INVALID_VALUE;
  handle->stream = stream;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params) {
  const SolverCall call;
  if (call.failed()) return call.status();
  *params = new struct cusolverDnParams;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params) {
  delete params;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t uplo, int n, double* a[], int lda,
                                         int* info, int batch_size) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (n < 0 || batch_size < 0 || lda < std::max(1, n) || uplo == CUBLAS_FILL_MODE_FULL) {
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  if (n == 0 || batch_size == 0) return CUSOLVER_STATUS_SUCCESS;
  record({.kind = Kind::library,
          .name = "cusolverDnDpotrfBatched",
          .type = Type::f64,
          .n = n,
          .batch = batch_size,
          .flops = batch_size * potrf_flops(n),
          .bytes = batch_size * 8.0 * 2 * triangle_elements(n)});
  return submit(handle->stream, Potrf{uplo == CUBLAS_FILL_MODE_UPPER, n, a, lda, info, batch_size, nan_passes()});
}

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t handle, cusolverDnParams_t params,
                                                   cusolverEigMode_t jobz, cublasFillMode_t, std::int64_t n,
                                                   cudaDataType type_a, const void*, std::int64_t lda,
                                                   cudaDataType type_w, const void*, cudaDataType compute_type,
                                                   std::size_t* device_bytes, std::size_t* host_bytes,
                                                   std::int64_t batch_size) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (!params || !device_bytes || !host_bytes || !eigen_arguments(jobz, n, lda, batch_size)) {
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  if (type_a != CUDA_R_64F || type_w != CUDA_R_64F || compute_type != CUDA_R_64F) return CUSOLVER_STATUS_NOT_SUPPORTED;
  *device_bytes = eigen_workspace(n, batch_size);
  *host_bytes = kEigenHostBytes;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t params, cusolverEigMode_t jobz,
                                        cublasFillMode_t uplo, std::int64_t n, cudaDataType type_a, void* a,
                                        std::int64_t lda, cudaDataType type_w, void* w, cudaDataType compute_type,
                                        void* device_buffer, std::size_t device_bytes, void* host_buffer,
                                        std::size_t host_bytes, int* info, std::int64_t batch_size) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (type_a != CUDA_R_64F || type_w != CUDA_R_64F || compute_type != CUDA_R_64F) return CUSOLVER_STATUS_NOT_SUPPORTED;
  if (!params || !eigen_arguments(jobz, n, lda, batch_size)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (device_bytes < eigen_workspace(n, batch_size) || host_bytes < kEigenHostBytes || !host_buffer) {
    return CUSOLVER_STATUS_INVALID_VALUE;
  }
  if (n == 0 || batch_size == 0) return CUSOLVER_STATUS_SUCCESS;
  std::memset(host_buffer, 0xff, host_bytes);
  const auto order = static_cast<double>(n), matrices = static_cast<double>(batch_size);
  const bool vectors = jobz == CUSOLVER_EIG_MODE_VECTOR;
  record({.kind = Kind::library,
          .name = "cusolverDnXsyevBatched",
          .type = Type::f64,
          .n = n,
          .batch = batch_size,
          .flops = matrices * syev_flops(order, vectors),
          .bytes = matrices * 8.0 * (triangle_elements(order) + (vectors ? order * order : 0.0) + order)});
  return submit(handle->stream,
                Syev{vectors, uplo == CUBLAS_FILL_MODE_UPPER, n, static_cast<double*>(a), lda, static_cast<double*>(w),
                     device_buffer, device_bytes, host_buffer, host_bytes, info, batch_size, nan_passes()});
}

cusolverStatus_t cusolverDnDgeqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, double*, int lda, int* lwork) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (m < 0 || n < 0 || lda < std::max(1, m) || !lwork) return CUSOLVER_STATUS_INVALID_VALUE;
  *lwork = qr_workspace(n);
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDgeqrf(cusolverDnHandle_t handle, int m, int n, double* a, int lda, double* tau,
                                  double* workspace, int lwork, int* info) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (m < 0 || n < 0 || lda < std::max(1, m) || lwork < qr_workspace(n)) return CUSOLVER_STATUS_INVALID_VALUE;
  record({.kind = Kind::library,
          .name = "cusolverDnDgeqrf",
          .type = Type::f64,
          .m = m,
          .n = n,
          .flops = geqrf_flops(m, n),
          .bytes = 8.0 * (2.0 * m * n + std::min(m, n))});
  return submit(handle->stream, Geqrf{m, n, a, lda, tau, workspace, lwork, info});
}

cusolverStatus_t cusolverDnDorgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k, const double*, int lda,
                                             const double*, int* lwork) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (k < 0 || n < k || m < n || lda < std::max(1, m) || !lwork) return CUSOLVER_STATUS_INVALID_VALUE;
  *lwork = qr_workspace(n);
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDorgqr(cusolverDnHandle_t handle, int m, int n, int k, double* a, int lda, const double* tau,
                                  double* workspace, int lwork, int* info) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (k < 0 || n < k || m < n || lda < std::max(1, m) || lwork < qr_workspace(n)) return CUSOLVER_STATUS_INVALID_VALUE;
  record({.kind = Kind::library,
          .name = "cusolverDnDorgqr",
          .type = Type::f64,
          .m = m,
          .n = n,
          .k = k,
          .flops = orgqr_flops(m, n, k),
          .bytes = 8.0 * (1.0 * m * k + 1.0 * m * n + k)});
  return submit(handle->stream, Orgqr{m, n, k, a, lda, tau, workspace, lwork, info});
}
