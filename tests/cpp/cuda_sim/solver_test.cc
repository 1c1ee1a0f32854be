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

}  // namespace
}  // namespace pissa::test
