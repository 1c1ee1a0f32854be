#include "pissa/cuda/factorize.h"

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

// A block mirrors one row of one matrix.
__global__ void mirror_lower_kernel(double* matrices, std::int64_t k) {
  double* matrix = matrices + blockIdx.y * k * k;
  const std::int64_t i = blockIdx.x;
  for (std::int64_t j = threadIdx.x; j < i; j += kThreads) matrix[j * k + i] = matrix[i * k + j];
}

struct Seen {
  int not_finite;
};

__global__ void identity_unless_finite_kernel(double* matrices, std::int64_t k, int flag, int* flags) {
  Seen& seen = shared_memory<Seen>();
  double* matrix = matrices + blockIdx.x * k * k;
  if (threadIdx.x == 0) seen.not_finite = 0;
  __syncthreads();
  int not_finite = 0;
  for (std::int64_t i = threadIdx.x; i < k * k; i += kThreads) not_finite |= matrix[i] - matrix[i] != 0.0;
  if (not_finite) atomicOr(&seen.not_finite, 1);
  __syncthreads();
  if (!seen.not_finite) return;
  for (std::int64_t i = threadIdx.x; i < k * k; i += kThreads) matrix[i] = i % (k + 1) == 0 ? 1.0 : 0.0;
  if (threadIdx.x == 0) atomicOr(flags + blockIdx.x, flag);
}

// A warp looks at one matrix: row i of the Gram matrix had the squared length of row i of L, and L[i, i] is what of it
// lies outside the rows before.
__global__ void check_pivots_kernel(const double* lower, std::int64_t k, double least_share, double least_pivot,
                                    const int* info, int flag, int* flags) {
  const double* matrix = lower + blockIdx.x * k * k;
  bool good = info[blockIdx.x] == 0;
  for (std::int64_t i = threadIdx.x; i < k && good; i += kWarp) {
    double squared = 0.0;
    for (std::int64_t j = 0; j <= i; ++j) squared += matrix[i * k + j] * matrix[i * k + j];
    const double pivot = matrix[i * k + i];
    good = pivot > least_pivot && pivot > least_share * sqrt(squared);  // false for NaN
  }
  if (!good) atomicOr(flags + blockIdx.x, flag);
}

// A block inverts one matrix, a thread a column at a time, by forward substitution: nobody waits for another. `work`
// has the column in f64; what the threads of a warp read lies together there, and is the same for all in `lower`.
__global__ void invert_lower_kernel(const double* lower, std::int64_t k, const int* flags, double* work,
                                    MutableMatrix inverse) {
  const double* factor = lower + blockIdx.x * k * k;
  double* column = work + blockIdx.x * k * k;
  float* out = static_cast<float*>(inverse.data) + blockIdx.x * inverse.stride;
  const bool bad = flags[blockIdx.x] != 0;
  for (std::int64_t j = threadIdx.x; j < k; j += blockDim.x) {
    for (std::int64_t i = 0; i < k; ++i) {
      double value = i == j ? 1.0 : 0.0;
      if (i >= j && !bad) {
        for (std::int64_t m = j; m < i; ++m) value -= factor[i * k + m] * column[m * k + j];
        value /= factor[i * k + i];
        column[i * k + j] = value;
      }
      out[i * inverse.ld + j] = static_cast<float>(value);
    }
  }
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

int narrowed(std::int64_t size) {
  PISSA_CHECK(size <= 0x7fffffff, "cuSOLVER: got a dimension of ", size, "; allowed: up to 2147483647");
  return static_cast<int>(size);
}

}  // namespace

void mirror_lower(const Context& context, double* matrices, std::int64_t k, std::int64_t count) {
  launch(context, "mirror_lower", mirror_lower_kernel, dim3(static_cast<unsigned>(k), static_cast<unsigned>(count)),
         kThreads, matrices, k);
}

void identity_unless_finite(const Context& context, double* matrices, std::int64_t k, Flag flag, int* flags,
                            std::int64_t count) {
  launch(context, "identity_unless_finite", identity_unless_finite_kernel, dim3(static_cast<unsigned>(count)), kThreads,
         matrices, k, static_cast<int>(flag), flags);
}

// Row-major lower is column-major upper.
void cholesky(const Context& context, double* gram, std::int64_t k, double least_share, double least_pivot, Flag flag,
              int* flags, std::int64_t count) {
  identity_unless_finite(context, gram, k, flag, flags, count);
  const auto matrices = pointers_to(context, gram, k * k, count);
  const Array<int> info(context, count);
  check(cusolverDnDpotrfBatched(context.solver(), CUBLAS_FILL_MODE_UPPER, narrowed(k), matrices.data(), narrowed(k),
                                info.data(), narrowed(count)),
        context, "cusolverDnDpotrfBatched", "n", k, "batch", count);
  launch(context, "check_pivots", check_pivots_kernel, dim3(static_cast<unsigned>(count)), kWarp, gram, k, least_share,
         least_pivot, info.data(), static_cast<int>(flag), flags);
}

void invert_lower(const Context& context, const double* lower, std::int64_t k, const int* flags,
                  const MutableMatrix& inverse, std::int64_t count) {
  const Array<double> work(context, count * k * k);
  const std::int64_t threads = ceil_div(k, kWarp) * kWarp;
  launch(context, "invert_lower", invert_lower_kernel, dim3(static_cast<unsigned>(count)),
         threads < kThreads ? static_cast<unsigned>(threads) : kThreads, lower, k, flags, work.data(), inverse);
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

}  // namespace pissa::cuda
