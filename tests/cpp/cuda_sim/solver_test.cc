// The simulated cuSOLVER, and cuBLAS's triangular solve, against formulas in double; what they refuse, and NaN.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "cusolverDn.h"
#include "support/cuda_sim_case.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

TEST_F(CudaSimTest, LibrariesFailWhenAsked) {
  cublasHandle_t blas;
  cusolverDnHandle_t solver;
  cuda_sim::fail_next(CUBLAS_STATUS_ALLOC_FAILED);
  cuda_sim::fail_next(CUSOLVER_STATUS_ALLOC_FAILED, 1);
  EXPECT_EQ(cublasCreate(&blas), CUBLAS_STATUS_ALLOC_FAILED);
  EXPECT_TRUE(cuda_sim::failure_pending());
  ASSERT_EQ(cusolverDnCreate(&solver), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(cusolverDnSetStream(solver, nullptr), CUSOLVER_STATUS_ALLOC_FAILED);
  EXPECT_FALSE(cuda_sim::failure_pending());
  EXPECT_EQ(cusolverDnDestroy(solver), CUSOLVER_STATUS_SUCCESS);
}

// ---- Triangles and factors ------------------------------------------------------------------------------------------

/// Column-major, with rows between the columns that nobody may touch.
std::vector<double> packed(const Dense& a, int ld) {
  std::vector<double> result(static_cast<std::size_t>(ld) * a.cols, 77);
  for (int j = 0; j < a.cols; ++j) {
    for (int i = 0; i < a.rows; ++i) result[i + static_cast<std::size_t>(j) * ld] = a(i, j);
  }
  return result;
}
Dense unpacked(const std::vector<double>& values, int rows, int cols, int ld) {
  Dense result(rows, cols);
  for (int j = 0; j < cols; ++j) {
    for (int i = 0; i < rows; ++i) result(i, j) = values[i + static_cast<std::size_t>(j) * ld];
    for (int i = rows; i < ld; ++i) EXPECT_EQ(values[i + static_cast<std::size_t>(j) * ld], 77);
  }
  return result;
}
Dense download_dense(const double* from, int rows, int cols, int ld) {
  return unpacked(download(from, static_cast<std::size_t>(ld) * cols), rows, cols, ld);
}

void expect_near(const Dense& actual, const Dense& expected, double bound) {
  EXPECT_LE(norm(actual - expected), bound * (1 + norm(expected)));
}

Dense identity(int n) {
  Dense result(n, n);
  for (int i = 0; i < n; ++i) result(i, i) = 1;
  return result;
}

/// The triangle alone; a unit diagonal is put in its place.
Dense triangle_of(Dense a, bool lower, bool unit) {
  for (int i = 0; i < a.rows; ++i) {
    for (int j = 0; j < a.cols; ++j) {
      if (lower ? j > i : j < i) a(i, j) = 0;
    }
    if (unit) a(i, i) = 1;
  }
  return a;
}

TEST_F(CudaSimTest, TriangularSolve) {
  cublasHandle_t handle;
  ASSERT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
  Random random(5);
  const int m = 6, n = 4, ldb = 8;
  for (int variant = 0; variant < 16; ++variant) {
    const bool left = variant & 1, lower = variant & 2, transposed = variant & 4, unit = variant & 8;
    const int size = left ? m : n, lda = size + 1;
    std::vector<double*> a_pointers, b_pointers;
    std::vector<Dense> a, b;
    for (int i = 0; i < 3; ++i) {
      a.push_back(random.dense(size, size) + 4.0 * identity(size));
      b.push_back(random.dense(m, n));
      a_pointers.push_back(upload(packed(a.back(), lda)));
      b_pointers.push_back(upload(packed(b.back(), ldb)));
    }
    const double alpha = 2;
    ASSERT_EQ(cublasDtrsmBatched(handle, left ? CUBLAS_SIDE_LEFT : CUBLAS_SIDE_RIGHT,
                                 lower ? CUBLAS_FILL_MODE_LOWER : CUBLAS_FILL_MODE_UPPER,
                                 transposed ? CUBLAS_OP_T : CUBLAS_OP_N, unit ? CUBLAS_DIAG_UNIT : CUBLAS_DIAG_NON_UNIT,
                                 m, n, &alpha, upload(a_pointers), lda, upload(b_pointers), ldb, 3),
              CUBLAS_STATUS_SUCCESS);
    for (int i = 0; i < 3; ++i) {
      const Dense x = download_dense(b_pointers[i], m, n, ldb);
      const Dense t = oriented(triangle_of(a[i], lower, unit), transposed ? Op::t : Op::n);
      expect_near(left ? t * x : x * t, 2.0 * b[i], 1e-11);
    }
  }
  EXPECT_EQ(cublasDestroy(handle), CUBLAS_STATUS_SUCCESS);
}

class SolverTest : public CudaSimTest {
 protected:
  void SetUp() override {
    CudaSimTest::SetUp();
    ASSERT_EQ(cusolverDnCreate(&handle), CUSOLVER_STATUS_SUCCESS);
    ASSERT_EQ(cusolverDnCreateParams(&params), CUSOLVER_STATUS_SUCCESS);
  }
  void TearDown() override {
    EXPECT_EQ(cusolverDnDestroy(handle), CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(cusolverDnDestroyParams(params), CUSOLVER_STATUS_SUCCESS);
    CudaSimTest::TearDown();
  }
  cusolverDnHandle_t handle;
  cusolverDnParams_t params;
  Random random{7};
};

TEST_F(SolverTest, Cholesky) {
  const int n = 7, ld = 9;
  for (const bool lower : {true, false}) {
    const Dense root = random.dense(n, n);
    const Dense good = root * transposed(root) + identity(n);
    Dense bad = good;
    bad(4, 4) = -1;
    const std::vector<double*> pointers{upload(packed(good, ld)), upload(packed(bad, ld))};
    int* info = device_memory<int>(2);
    ASSERT_EQ(cusolverDnDpotrfBatched(handle, lower ? CUBLAS_FILL_MODE_LOWER : CUBLAS_FILL_MODE_UPPER, n,
                                      upload(pointers), ld, info, 2),
              CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(download(info, 2), (std::vector<int>{0, 5}));
    const Dense factor = triangle_of(download_dense(pointers[0], n, n, ld), lower, false);
    expect_near(lower ? factor * transposed(factor) : transposed(factor) * factor, good, 1e-13);
    EXPECT_EQ(download_dense(pointers[1], n, n, ld)(4, 4), -1);
  }
}

TEST_F(SolverTest, Eigenvalues) {
  for (const int n : {1, 2, 13, 40}) {
    for (const bool lower : {true, false}) {
      const Dense root = random.dense(n, n > 20 ? n / 2 : n);  // the larger one is singular
      const Dense matrices[] = {root * transposed(root), random.dense(n, n) + -0.5 * identity(n)};
      std::vector<double> values;
      std::vector<Dense> exact;
      for (const Dense& matrix : matrices) {
        const Dense stored = triangle_of(matrix, lower, false);
        const auto numbers = packed(stored, n);
        values.insert(values.end(), numbers.begin(), numbers.end());
        Dense full = stored + transposed(stored);
        for (int i = 0; i < n; ++i) full(i, i) /= 2;
        exact.push_back(full);
      }
      double* a = upload(values);
      double* w = device_memory<double>(2 * n);
      int* info = device_memory<int>(2);
      std::size_t device_bytes, host_bytes;
      const auto uplo = lower ? CUBLAS_FILL_MODE_LOWER : CUBLAS_FILL_MODE_UPPER;
      ASSERT_EQ(cusolverDnXsyevBatched_bufferSize(handle, params, CUSOLVER_EIG_MODE_VECTOR, uplo, n, CUDA_R_64F, a, n,
                                                  CUDA_R_64F, w, CUDA_R_64F, &device_bytes, &host_bytes, 2),
                CUSOLVER_STATUS_SUCCESS);
      char* buffer = device_memory<char>(device_bytes);
      std::vector<char> host_buffer(host_bytes);
      const auto solve = [&](std::size_t bytes) {
        return cusolverDnXsyevBatched(handle, params, CUSOLVER_EIG_MODE_VECTOR, uplo, n, CUDA_R_64F, a, n, CUDA_R_64F,
                                      w, CUDA_R_64F, buffer, bytes, host_buffer.data(), host_bytes, info, 2);
      };
      EXPECT_EQ(solve(device_bytes - 1), CUSOLVER_STATUS_INVALID_VALUE);
      ASSERT_EQ(solve(device_bytes), CUSOLVER_STATUS_SUCCESS);
      EXPECT_EQ(download(info, 2), (std::vector<int>{0, 0}));
      for (int i = 0; i < 2; ++i) {
        const std::vector<double> eigenvalues = download(w + i * n, n);
        const Dense vectors = download_dense(a + i * n * n, n, n, n);
        EXPECT_TRUE(std::is_sorted(eigenvalues.begin(), eigenvalues.end()));
        Dense scaled = vectors;
        for (int j = 0; j < n; ++j) {
          for (int k = 0; k < n; ++k) scaled(k, j) *= eigenvalues[j];
        }
        expect_near(scaled * transposed(vectors), exact[i], 1e-13);
        expect_near(transposed(vectors) * vectors, identity(n), 1e-13);
      }
    }
  }
}

TEST_F(SolverTest, QrAndItsQ) {
  for (const auto& [m, n, columns] : {std::tuple{12, 5, 5}, {12, 5, 8}, {6, 6, 6}, {9, 1, 9}}) {
    const int ld = m + 2;
    Dense exact = random.dense(m, columns);
    if (n > 2) {
      for (int i = 0; i < m; ++i) exact(i, 2) = exact(i, 0);  // a column that depends on others
    }
    double* a = upload(packed(exact, ld));
    double* tau = device_memory<double>(n);
    int* info = device_memory<int>(1);
    int lwork;
    ASSERT_EQ(cusolverDnDgeqrf_bufferSize(handle, m, n, a, ld, &lwork), CUSOLVER_STATUS_SUCCESS);
    double* workspace = device_memory<double>(lwork);
    EXPECT_EQ(cusolverDnDgeqrf(handle, m, n, a, ld, tau, workspace, lwork - 1, info), CUSOLVER_STATUS_INVALID_VALUE);
    ASSERT_EQ(cusolverDnDgeqrf(handle, m, n, a, ld, tau, workspace, lwork, info), CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(download(info, 1)[0], 0);
    const Dense factors = download_dense(a, m, columns, ld);
    ASSERT_EQ(cusolverDnDorgqr_bufferSize(handle, m, columns, n, a, ld, tau, &lwork), CUSOLVER_STATUS_SUCCESS);
    workspace = device_memory<double>(lwork);
    ASSERT_EQ(cusolverDnDorgqr(handle, m, columns, n, a, ld, tau, workspace, lwork, info), CUSOLVER_STATUS_SUCCESS);
    const Dense q = download_dense(a, m, columns, ld);
    expect_near(transposed(q) * q, identity(columns), 1e-13);
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < m; ++i) {
        double product = 0;
        for (int k = 0; k <= j; ++k) product += q(i, k) * factors(k, j);
        EXPECT_NEAR(product, exact(i, j), 1e-13);
      }
      EXPECT_TRUE(factors(j, j) * exact(0, 0) <= 0 || j > 0);  // LAPACK's sign of the first
      for (const double value : download(tau, n)) EXPECT_TRUE(value == 0 || (value >= 1 && value <= 2));
    }
  }
}

// ---- NaN ------------------------------------------------------------------------------------------------------------

/// Each solver on a matrix of 5 rows and columns of which it reads the lower triangle, as the second of a batch if it
/// takes one.
class SolverOnNaN : public SolverTest {
 protected:
  static constexpr int kSize = 5, kElements = kSize * kSize;
  struct Outcome {
    cusolverStatus_t status;
    int info;       // of the matrix
    double last;    // what was computed last of it
    bool computed;  // anything, of the first of the batch
  };
  struct Solver {
    const char* name;
    Outcome (SolverOnNaN::*solve)(const Dense&);
    int info;        // LAPACK's where an element is NaN
    bool reads_all;  // of the matrix
    bool stops_early;
  };

  Dense positive() {
    const Dense root = random.dense(kSize, kSize);
    return root * transposed(root) + identity(kSize);
  }

  Outcome potrf(const Dense& matrix) {
    const std::vector<double> first = packed(positive(), kSize);
    const std::vector<double*> pointers{upload(first), upload(packed(matrix, kSize))};
    int* info = device_memory<int>(2);
    const auto status =
        cusolverDnDpotrfBatched(handle, CUBLAS_FILL_MODE_LOWER, kSize, upload(pointers), kSize, info, 2);
    return {status, download(info, 2)[1], download(pointers[1], kElements).back(),
            download(pointers[0], kElements) != first};
  }

  Outcome syev(const Dense& matrix) {
    const std::vector<double> first = packed(positive(), kSize), second = packed(matrix, kSize);
    std::vector<double> both = first;
    both.insert(both.end(), second.begin(), second.end());
    double *a = upload(both), *w = device_memory<double>(2 * kSize);
    int* info = device_memory<int>(2);
    std::size_t device_bytes, host_bytes;
    EXPECT_EQ(cusolverDnXsyevBatched_bufferSize(handle, params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, kSize,
                                                CUDA_R_64F, a, kSize, CUDA_R_64F, w, CUDA_R_64F, &device_bytes,
                                                &host_bytes, 2),
              CUSOLVER_STATUS_SUCCESS);
    std::vector<char> host_buffer(host_bytes);
    const auto status = cusolverDnXsyevBatched(
        handle, params, CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, kSize, CUDA_R_64F, a, kSize, CUDA_R_64F, w,
        CUDA_R_64F, device_memory<char>(device_bytes), device_bytes, host_buffer.data(), host_bytes, info, 2);
    return {status, download(info, 2)[1], download(w, 2 * kSize).back(), download(a, kElements) != first};
  }

  Outcome geqrf(const Dense& matrix) {
    const std::vector<double> values = packed(matrix, kSize);
    double* a = upload(values);
    int* info = device_memory<int>(1);
    int lwork;
    EXPECT_EQ(cusolverDnDgeqrf_bufferSize(handle, kSize, kSize, a, kSize, &lwork), CUSOLVER_STATUS_SUCCESS);
    const auto status = cusolverDnDgeqrf(handle, kSize, kSize, a, kSize, device_memory<double>(kSize),
                                         device_memory<double>(lwork), lwork, info);
    return {status, download(info, 1)[0], download(a, kElements).back(),
            download(a, kElements).back() != values.back()};
  }

  Outcome orgqr(const Dense& matrix) {
    const std::vector<double> values = packed(matrix, kSize);
    double *a = upload(values), *tau = upload(std::vector<double>(kSize, 0.5));
    int* info = device_memory<int>(1);
    int lwork;
    EXPECT_EQ(cusolverDnDorgqr_bufferSize(handle, kSize, kSize, kSize, a, kSize, tau, &lwork), CUSOLVER_STATUS_SUCCESS);
    const auto status =
        cusolverDnDorgqr(handle, kSize, kSize, kSize, a, kSize, tau, device_memory<double>(lwork), lwork, info);
    return {status, download(info, 1)[0], download(a, kElements).back(),
            download(a, kElements).back() != values.back()};
  }

  const Solver kSolvers[4] = {{"potrf", &SolverOnNaN::potrf, 4, false, true},
                              {"syev", &SolverOnNaN::syev, 1, false, false},
                              {"geqrf", &SolverOnNaN::geqrf, 0, true, false},
                              {"orgqr", &SolverOnNaN::orgqr, 0, false, false}};
  Outcome solve(const Solver& solver, const Dense& matrix, cuda_sim::OnNaN mode) {
    cuda_sim::set_solver_on_nan(mode);
    return (this->*solver.solve)(matrix);
  }
};

using cuda_sim::OnNaN;

TEST_F(SolverOnNaN, IsWhatWasAskedFor) {
  Dense bad = positive();
  bad(3, 1) = NAN;
  for (const Solver& solver : kSolvers) {
    SCOPED_TRACE(solver.name);
    Outcome outcome = solve(solver, bad, OnNaN::info);
    EXPECT_EQ(outcome.status, CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(outcome.info, solver.info);
    EXPECT_EQ(std::isnan(outcome.last), !solver.stops_early);
    EXPECT_TRUE(outcome.computed);

    outcome = solve(solver, bad, OnNaN::info_zero);
    EXPECT_EQ(outcome.status, CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(outcome.info, 0);
    EXPECT_TRUE(std::isnan(outcome.last));
    EXPECT_TRUE(outcome.computed);

    for (const auto& [mode, status] : {std::pair{OnNaN::status_invalid_value, CUSOLVER_STATUS_INVALID_VALUE},
                                       {OnNaN::status_execution_failed, CUSOLVER_STATUS_EXECUTION_FAILED}}) {
      outcome = solve(solver, bad, mode);
      EXPECT_EQ(outcome.status, status);
      EXPECT_FALSE(outcome.computed);
    }
  }
}

// Also where the data is still on its way, and fresh memory is NaN, when the solver is called.
TEST_F(SolverOnNaN, NothingHappensWithoutIt) {
  const Dense good = positive();
  Dense unread = good;
  unread(1, 3) = NAN;
  for (const Solver& solver : kSolvers) {
    for (const OnNaN mode :
         {OnNaN::info, OnNaN::info_zero, OnNaN::status_invalid_value, OnNaN::status_execution_failed}) {
      SCOPED_TRACE(::testing::Message() << solver.name << ", mode " << static_cast<int>(mode));
      for (const Dense& matrix : {good, solver.reads_all ? good : unread}) {
        const Outcome outcome = solve(solver, matrix, mode);
        EXPECT_EQ(outcome.status, CUSOLVER_STATUS_SUCCESS);
        EXPECT_EQ(outcome.info, 0);
        EXPECT_TRUE(std::isfinite(outcome.last));
        EXPECT_TRUE(outcome.computed);
      }
    }
  }
}

TEST_F(SolverOnNaN, TheHostDoesNotWaitForIt) {
  const std::vector<double*> pointers{upload(packed(positive(), kSize))};
  cuda_sim::set_solver_on_nan(OnNaN::status_invalid_value);
  const auto before = cuda_sim::synchronizations();
  EXPECT_EQ(
      cusolverDnDpotrfBatched(handle, CUBLAS_FILL_MODE_LOWER, kSize, upload(pointers), kSize, device_memory<int>(1), 1),
      CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(cuda_sim::synchronizations(), before);
}

TEST_F(SolverOnNaN, IsInfoAfterReset) {
  cuda_sim::set_solver_on_nan(OnNaN::status_invalid_value);
  cuda_sim::reset_libraries();
  Dense bad = positive();
  bad(3, 1) = NAN;
  EXPECT_EQ(potrf(bad).info, 4);
}

}  // namespace
}  // namespace pissa::test
