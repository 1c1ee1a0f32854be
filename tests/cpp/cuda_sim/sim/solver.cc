#include <algorithm>
#include <cmath>
#include <limits>

#include "cusolverDn.h"
#include "sim/library.h"
#include "sim/modes.h"

struct cusolverDnContext {
  const int device = cuda_sim::detail::current_device();
  cudaStream_t stream = nullptr;
};

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

bool has_nan(const double* first, int count) {
  return std::any_of(first, first + count, [](double value) { return std::isnan(value); });
}

/// A = U^T U. Returns the first pivot that is not positive, from 1, or 0. NaN is such a pivot or, where it `passes`,
/// none.
int cholesky(const View& a, int n, bool nan_passes) {
  for (int j = 0; j < n; ++j) {
    double pivot = a(j, j);
    for (int k = 0; k < j; ++k) pivot -= a(k, j) * a(k, j);
    if (pivot <= 0 || (std::isnan(pivot) && !nan_passes)) return j + 1;
    const double root = std::sqrt(pivot);
    a(j, j) = root;
    for (int i = j + 1; i < n; ++i) {
      double value = a(j, i);
      for (int k = 0; k < j; ++k) value -= a(k, i) * a(k, j);
      a(j, i) = value / root;
    }
  }
  return 0;
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
  for (int j = 0; j < n; ++j) {
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

void form_q(const View& a, int m, int n, const double* tau) {
  for (int j = n - 1; j >= 0; --j) {
    reflect(a, m, j, tau[j], j + 1, n);
    for (int i = 0; i < j; ++i) a(i, j) = 0;
    for (int i = j + 1; i < m; ++i) a(i, j) *= -tau[j];
    a(j, j) = 1 - tau[j];
  }
}

// What is asked of callers' workspace: not needed, but large enough to be missed.
int qr_workspace(int n) { return 32 * n + 64; }

/// Queues work on matrices, as a struct: `require_memory()` says that all it touches is allocated, `has_nan()` looks at
/// what it reads, `solve()` does it. What a call returns is known when it returns, before its work has run; so where a
/// status depends on the data, what makes the data has to run first.
template <class Work>
cusolverStatus_t submit(cudaStream_t stream, const Work& work) {
  if (!is_dry() && library_modes.solver_on_nan == OnNaN::status) {
    run_queued(stream);
    const DeviceOpen open(device_of(stream));
    work.require_memory();
    if (work.has_nan()) return CUSOLVER_STATUS_EXECUTION_FAILED;
  }
  enqueue(stream, [work] {
    work.require_memory();
    work.solve();
  });
  return CUSOLVER_STATUS_SUCCESS;
}

struct Potrf {
  int n;
  double* const* a;
  int lda;
  int* info;
  int count;
  bool nan_passes;

  View matrix(int k) const { return {a[k], lda}; }
  void require_memory() const {
    require_allocated(a, count * sizeof(*a), "cusolverDnDpotrfBatched: array of A");
    require_allocated(info, count * sizeof(*info), "cusolverDnDpotrfBatched: info");
    for (int k = 0; k < count; ++k) require_allocated(a[k], extent(n, n, lda, 8), "cusolverDnDpotrfBatched: A");
  }
  bool has_nan() const {
    for (int k = 0; k < count; ++k) {
      for (int j = 0; j < n; ++j) {
        if (detail::has_nan(matrix(k).column(j), j + 1)) return true;
      }
    }
    return false;
  }
  void solve() const {
    for (int k = 0; k < count; ++k) {
      info[k] = cholesky(matrix(k), n, nan_passes);
      for (int j = 0; j < n; ++j) {
        for (int i = j + 1; i < n; ++i) matrix(k)(i, j) = kNaN;  // workspace to the real one
      }
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
    require_allocated(tau, static_cast<std::size_t>(n) * 8, "cusolverDnDgeqrf: tau");
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
  int m, n;
  double* a;
  int lda;
  const double* tau;
  double* workspace;
  int lwork;
  int* info;

  void require_memory() const {
    require_allocated(info, sizeof(*info), "cusolverDnDorgqr: info");
    require_allocated(a, extent(m, n, lda, 8), "cusolverDnDorgqr: A");
    require_allocated(tau, static_cast<std::size_t>(n) * 8, "cusolverDnDorgqr: tau");
  }
  /// Of the vectors of the reflections: what lies above them is not read.
  bool has_nan() const {
    for (int j = 0; j < n; ++j) {
      if (detail::has_nan(View{a, lda}.column(j) + j + 1, m - j - 1)) return true;
    }
    return detail::has_nan(tau, n);
  }
  void solve() const {
    spoil(workspace, static_cast<std::size_t>(lwork) * 8, "cusolverDnDorgqr: workspace");
    form_q({a, lda}, m, n, tau);
    *info = 0;
  }
};

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

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (!is_stream(stream) || device_of(stream) != handle->device) return CUSOLVER_STATUS_INVALID_VALUE;
  handle->stream = stream;
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDpotrfBatched(cusolverDnHandle_t handle, cublasFillMode_t, int n, double* a[], int lda,
                                         int* info, int batch_size) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (n < 0 || batch_size < 0 || lda < std::max(1, n)) return CUSOLVER_STATUS_INVALID_VALUE;
  if (n == 0 || batch_size == 0) return CUSOLVER_STATUS_SUCCESS;
  record({.kind = Kind::library,
          .name = "cusolverDnDpotrfBatched",
          .type = Type::f64,
          .n = n,
          .batch = batch_size,
          .flops = batch_size * potrf_flops(n)});
  const bool nan_passes = library_modes.solver_on_nan == cuda_sim::OnNaN::info_zero;
  return submit(handle->stream, Potrf{n, a, lda, info, batch_size, nan_passes});
}

cusolverStatus_t cusolverDnDgeqrf_bufferSize(cusolverDnHandle_t handle, int m, int n, double*, int lda, int* lwork) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (n < 0 || m < n || lda < std::max(1, m)) return CUSOLVER_STATUS_INVALID_VALUE;
  *lwork = qr_workspace(n);
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDgeqrf(cusolverDnHandle_t handle, int m, int n, double* a, int lda, double* tau,
                                  double* workspace, int lwork, int* info) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (n < 0 || m < n || lda < std::max(1, m) || lwork < qr_workspace(n)) return CUSOLVER_STATUS_INVALID_VALUE;
  record({.kind = Kind::library,
          .name = "cusolverDnDgeqrf",
          .type = Type::f64,
          .m = m,
          .n = n,
          .flops = geqrf_flops(m, n)});
  return submit(handle->stream, Geqrf{m, n, a, lda, tau, workspace, lwork, info});
}

cusolverStatus_t cusolverDnDorgqr_bufferSize(cusolverDnHandle_t handle, int m, int n, int k, const double*, int lda,
                                             const double*, int* lwork) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (n < 0 || k != n || m < n || lda < std::max(1, m)) return CUSOLVER_STATUS_INVALID_VALUE;
  *lwork = qr_workspace(n);
  return CUSOLVER_STATUS_SUCCESS;
}

cusolverStatus_t cusolverDnDorgqr(cusolverDnHandle_t handle, int m, int n, int k, double* a, int lda, const double* tau,
                                  double* workspace, int lwork, int* info) {
  const SolverCall call;
  if (call.failed()) return call.status();
  if (const cusolverStatus_t status = check_handle(handle)) return status;
  if (n < 0 || k != n || m < n || lda < std::max(1, m) || lwork < qr_workspace(n)) return CUSOLVER_STATUS_INVALID_VALUE;
  record({.kind = Kind::library,
          .name = "cusolverDnDorgqr",
          .type = Type::f64,
          .m = m,
          .n = n,
          .k = k,
          .flops = geqrf_flops(m, n)});  // of as many reflectors as columns, the same
  return submit(handle->stream, Orgqr{m, n, a, lda, tau, workspace, lwork, info});
}
