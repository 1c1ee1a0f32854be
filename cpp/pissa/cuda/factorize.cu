#include "pissa/cuda/factorize.h"

#include <memory>
#include <type_traits>

#include "pissa/core/format.h"
#include "pissa/cuda/device.h"
#include "pissa/cuda/elementwise.h"

namespace pissa::cuda {
namespace {

constexpr unsigned kThreads = 256;

__global__ void pointers_kernel(double* base, std::int64_t stride, double** pointers, int count) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < count) pointers[i] = base + i * stride;
}

Array<double*> pointers_to(const Context& context, double* base, std::int64_t stride, std::int64_t count) {
  Array<double*> pointers(context, count);
  launch(context, "pointers", pointers_kernel, dim3(static_cast<unsigned>(ceil_div(count, kThreads))), kThreads, base,
         stride, pointers.data(), static_cast<int>(count));
  return pointers;
}

// A warp looks at one matrix: row i of the Gram matrix had the squared length of row i of L, and L[i, i] is what of it
// lies outside the rows before.
__global__ void check_pivots_kernel(const double* lower, std::int64_t k, double least_share, double least_pivot,
                                    const int* info, int* flags) {
  const double* matrix = lower + blockIdx.x * k * k;
  bool good = info[blockIdx.x] == 0;
  for (std::int64_t i = threadIdx.x; i < k && good; i += kWarp) {
    double squared = 0.0;
    for (std::int64_t j = 0; j <= i; ++j) squared += matrix[i * k + j] * matrix[i * k + j];
    const double pivot = matrix[i * k + i];
    good = pivot > least_pivot && pivot > least_share * sqrt(squared);  // false for NaN
  }
  if (!good) atomicOr(flags + blockIdx.x, kDependentRows);
}

__global__ void check_info_kernel(const int* info, int count, int flag, int* flags) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < count && info[i] != 0) atomicOr(flags + i, flag);
}

// signs[i] = sign of R[i, i]
__global__ void signs_kernel(const double* r, std::int64_t ld, int count, double* signs) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < count) signs[i] = r[i * ld + i] < 0 ? -1.0 : 1.0;
}

// out[i, :] = signs[first + i] * q[first + i, :], one block a row
__global__ void signed_rows_kernel(const double* q, const double* signs, std::int64_t first, MutableMatrix out) {
  const double sign = signs[first + blockIdx.x];
  const double* from = q + (first + blockIdx.x) * out.cols;
  float* to = static_cast<float*>(out.data) + blockIdx.x * out.ld;
  for (std::int64_t j = threadIdx.x; j < out.cols; j += kThreads) to[j] = static_cast<float>(sign * from[j]);
}

// One block for each eigenvector, and matrix of the stack; cuSOLVER's are in the columns of a column-major matrix,
// ascending.
__global__ void leading_kernel(const double* vectors, const double* values, std::int64_t k, double scale,
                               MutableMatrix s, MutableMatrix out) {
  const std::int64_t source = k - 1 - blockIdx.x;
  const double* from = vectors + (blockIdx.y * k + source) * k;
  float* to = static_cast<float*>(out.data) + blockIdx.y * out.stride + blockIdx.x * out.ld;
  for (std::int64_t j = threadIdx.x; j < k; j += kThreads) to[j] = static_cast<float>(from[j]);
  if (threadIdx.x != 0) return;
  const double value = values[blockIdx.y * k + source];
  static_cast<float*>(s.data)[blockIdx.y * s.stride + blockIdx.x] =
      static_cast<float>(scale * sqrt(value > 0 ? value : 0.0));
}

int narrowed(std::int64_t size) {
  PISSA_CHECK(size <= 0x7fffffff, "cuSOLVER: got a dimension of ", size, "; allowed: up to 2147483647");
  return static_cast<int>(size);
}

}  // namespace

// Row-major lower is column-major upper.
void cholesky(const Context& context, double* gram, std::int64_t k, double least_share, double least_pivot, int* flags,
              std::int64_t count) {
  const auto matrices = pointers_to(context, gram, k * k, count);
  const Array<int> info(context, count);
  check(cusolverDnDpotrfBatched(context.solver(), CUBLAS_FILL_MODE_UPPER, narrowed(k), matrices.data(), narrowed(k),
                                info.data(), narrowed(count)),
        context, "cusolverDnDpotrfBatched", "n", k, "batch", count);
  launch(context, "check_pivots", check_pivots_kernel, dim3(static_cast<unsigned>(count)), kWarp, gram, k, least_share,
         least_pivot, info.data(), flags);
}

// In column-major words: X = rows^T [cols, k], the factor is U = L^T, and X L^-T = X U^-1.
void solve_lower(const Context& context, const double* lower, std::int64_t k, double* rows, std::int64_t cols,
                 std::int64_t count) {
  const auto factors = pointers_to(context, const_cast<double*>(lower), k * k, count);
  const auto sides = pointers_to(context, rows, k * cols, count);
  const double one = 1.0;
  check(cublasDtrsmBatched(context.blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT,
                           narrowed(cols), narrowed(k), &one, factors.data(), narrowed(k), sides.data(), narrowed(cols),
                           narrowed(count)),
        context, "cublasDtrsmBatched", "m", cols, "n", k, "batch", count);
}

void householder_rows(const Context& context, const MutableMatrix& basis, std::int64_t done, int* flags) {
  const int m = narrowed(basis.cols), n = narrowed(basis.rows);
  const cusolverDnHandle_t solver = context.solver();
  const Array<double> q(context, basis.rows * basis.cols), tau(context, n), signs(context, n);
  const Array<int> info(context, 2);
  widen(context, basis, q.data(), 1);
  int qr_work = 0, q_work = 0;
  check(cusolverDnDgeqrf_bufferSize(solver, m, n, q.data(), m, &qr_work), context, "cusolverDnDgeqrf_bufferSize", "m",
        m, "n", n);
  check(cusolverDnDorgqr_bufferSize(solver, m, n, n, q.data(), m, tau.data(), &q_work), context,
        "cusolverDnDorgqr_bufferSize", "m", m, "n", n);
  const Array<double> work(context, qr_work > q_work ? qr_work : q_work);
  check(cusolverDnDgeqrf(solver, m, n, q.data(), m, tau.data(), work.data(), qr_work, info.data()), context,
        "cusolverDnDgeqrf", "m", m, "n", n);
  launch(context, "signs", signs_kernel, dim3(static_cast<unsigned>(ceil_div(n, kThreads))), kThreads, q.data(),
         basis.cols, n, signs.data());
  check(cusolverDnDorgqr(solver, m, n, n, q.data(), m, tau.data(), work.data(), q_work, info.data() + 1), context,
        "cusolverDnDorgqr", "m", m, "n", n);
  const MutableMatrix rows = rows_of(basis, done, basis.rows - done);
  launch(context, "signed_rows", signed_rows_kernel, dim3(static_cast<unsigned>(rows.rows)), kThreads, q.data(),
         signs.data(), done, rows);
  for (int i = 0; i < 2; ++i) {
    launch(context, "check_info", check_info_kernel, dim3(1), kThreads, info.data() + i, 1,
           static_cast<int>(kNotConverged), flags);
  }
}

void leading_eigh(const Context& context, double* gram, std::int64_t k, float scale, const MutableMatrix& s,
                  const MutableMatrix& vectors, int* flags, std::int64_t count, std::vector<char>& host_work) {
  const cusolverDnHandle_t solver = context.solver();
  const Array<double> values(context, count * k);
  const Array<int> info(context, count);
  cusolverDnParams_t made = nullptr;
  check(cusolverDnCreateParams(&made), context, "cusolverDnCreateParams");
  const std::unique_ptr<std::remove_pointer_t<cusolverDnParams_t>, cusolverStatus_t (*)(cusolverDnParams_t)> params(
      made, cusolverDnDestroyParams);
  std::size_t device_bytes = 0, host_bytes = 0;
  check(cusolverDnXsyevBatched_bufferSize(solver, params.get(), CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER, k,
                                          CUDA_R_64F, gram, k, CUDA_R_64F, values.data(), CUDA_R_64F, &device_bytes,
                                          &host_bytes, count),
        context, "cusolverDnXsyevBatched_bufferSize", "n", k, "batch", count);
  const Array<char> work(context, static_cast<std::int64_t>(device_bytes));
  host_work.resize(host_bytes);
  check(cusolverDnXsyevBatched(solver, params.get(), CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_UPPER, k, CUDA_R_64F,
                               gram, k, CUDA_R_64F, values.data(), CUDA_R_64F, work.data(), device_bytes,
                               host_work.data(), host_bytes, info.data(), count),
        context, "cusolverDnXsyevBatched", "n", k, "batch", count);
  launch(context, "leading", leading_kernel, dim3(static_cast<unsigned>(vectors.rows), static_cast<unsigned>(count)),
         kThreads, gram, values.data(), k, static_cast<double>(scale), s, vectors);
  launch(context, "check_info", check_info_kernel, dim3(static_cast<unsigned>(ceil_div(count, kThreads))), kThreads,
         info.data(), static_cast<int>(count), static_cast<int>(kNotConverged), flags);
}

}  // namespace pissa::cuda
