// The simulated cuBLASLt, cuBLAS and cuSOLVER against formulas in double, and what they refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cublasLt.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cusolverDn.h"
#include "support/cuda_sim_case.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

// ---- cublasLtMatmul -------------------------------------------------------------------------------------------------

double encoded(cudaDataType type, double value) {
  if (type == CUDA_R_16BF) return __bfloat162float(__float2bfloat16_rn(static_cast<float>(value)));
  if (type == CUDA_R_16F) return __half2float(__float2half_rn(static_cast<float>(value)));
  return type == CUDA_R_32F ? static_cast<float>(value) : value;
}

std::size_t size_of(cudaDataType type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

template <class T, class Encode>
std::vector<unsigned char> bytes_of(const std::vector<double>& values, Encode encode) {
  std::vector<T> elements(values.size());
  std::transform(values.begin(), values.end(), elements.begin(), encode);
  const auto* first = reinterpret_cast<const unsigned char*>(elements.data());
  return {first, first + elements.size() * sizeof(T)};
}

unsigned char* upload_as(cudaDataType type, const std::vector<double>& values) {
  switch (type) {
    case CUDA_R_16BF:
      return upload(
          bytes_of<__nv_bfloat16>(values, [](double v) { return __float2bfloat16_rn(static_cast<float>(v)); }));
    case CUDA_R_16F:
      return upload(bytes_of<__half>(values, [](double v) { return __float2half_rn(static_cast<float>(v)); }));
    case CUDA_R_32F:
      return upload(bytes_of<float>(values, [](double v) { return static_cast<float>(v); }));
    default:
      return upload(bytes_of<double>(values, [](double v) { return v; }));
  }
}

std::vector<double> download_as(cudaDataType type, const void* from, std::size_t count) {
  const auto decode = [count]<class T>(const std::vector<T>& elements, auto one) {
    std::vector<double> result(count);
    std::transform(elements.begin(), elements.end(), result.begin(), one);
    return result;
  };
  switch (type) {
    case CUDA_R_16BF:
      return decode(download(static_cast<const __nv_bfloat16*>(from), count), __bfloat162float);
    case CUDA_R_16F:
      return decode(download(static_cast<const __half*>(from), count), __half2float);
    case CUDA_R_32F:
      return decode(download(static_cast<const float*>(from), count), [](float value) { return value; });
    default:
      return download(static_cast<const double*>(from), count);
  }
}

/// A product with all that it takes, to be changed before it is called.
struct Matmul {
  cudaDataType in = CUDA_R_16BF, out = CUDA_R_32F;
  bool transpose_a = false, transpose_b = false, bias = false;
  int batch = 1;
  double alpha = 1, beta = 0;
  std::uint32_t alignment = 16, schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  std::int64_t extra_ld = 3;  // of all
  std::int64_t wrong_ld = 0;  // added to what A's layout says
  std::size_t offset = 0;     // bytes that A lies behind an aligned address
  bool workspace = true;
  std::uint64_t m = 7, n = 5, k = 9;

  std::vector<double> result = {}, expected = {};

  cublasStatus_t run() {
    Random random(3);
    const auto numbers = [&](std::size_t count) {
      std::vector<double> values(count);
      for (double& value : values) value = random.normal();
      return values;
    };
    const auto a_rows = static_cast<std::int64_t>(transpose_a ? k : m),
               b_rows = static_cast<std::int64_t>(transpose_b ? n : k);
    const std::int64_t a_cols = static_cast<std::int64_t>(m + k) - a_rows,
                       b_cols = static_cast<std::int64_t>(n + k) - b_rows;
    const std::int64_t lda = a_rows + extra_ld, ldb = b_rows + extra_ld, ldd = static_cast<std::int64_t>(m) + extra_ld;
    const auto count = static_cast<std::size_t>(batch);
    auto a = numbers(count * lda * a_cols), b = numbers(count * ldb * b_cols), c = numbers(count * ldd * n);
    const auto bias_values = numbers(m);
    unsigned char* bias_pointer = bias ? upload_as(out, bias_values) : nullptr;

    const double float64 = in == CUDA_R_64F;
    cublasHandle_t handle;
    EXPECT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
    const auto lt = reinterpret_cast<cublasLtHandle_t>(handle);
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulDescCreate(&desc, float64 ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                             float64 ? CUDA_R_64F : CUDA_R_32F);
    const std::int32_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    if (bias) {
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
      cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_pointer, sizeof bias_pointer);
    }
    const auto layout = [&](cudaDataType type, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
      cublasLtMatrixLayout_t made;
      cublasLtMatrixLayoutCreate(&made, type, rows, cols, ld);
      const std::int64_t stride = ld * cols;
      const std::int32_t batches = batch;
      cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batches, sizeof batches);
      cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride);
      return made;
    };
    const cublasLtMatrixLayout_t a_layout = layout(in, a_rows, a_cols, lda + wrong_ld);
    const cublasLtMatrixLayout_t b_layout = layout(in, b_rows, b_cols, ldb), d_layout = layout(out, m, n, ldd);
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulPreferenceCreate(&preference);
    const std::uint64_t workspace_bytes = 1 << 16;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                                         sizeof workspace_bytes);
    for (const auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      cublasLtMatmulPreferenceSetAttribute(preference, which, &alignment, sizeof alignment);
    }
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes,
                                         sizeof schemes);
    cublasLtMatmulHeuristicResult_t algorithm;
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt, desc, a_layout, b_layout, d_layout, d_layout, preference,
                                                           1, &algorithm, &found);
    if (status == CUBLAS_STATUS_SUCCESS) {
      unsigned char* a_pointer = upload_as(in, a) + offset;
      unsigned char* b_pointer = upload_as(in, b);
      unsigned char* d_pointer = beta == 0 ? device_memory<unsigned char>(c.size() * size_of(out)) : upload_as(out, c);
      char* workspace_pointer = workspace ? device_memory<char>(workspace_bytes) : nullptr;
      const float alpha32 = static_cast<float>(alpha), beta32 = static_cast<float>(beta);
      const void* alpha_pointer = float64 ? static_cast<const void*>(&alpha) : &alpha32;
      const void* beta_pointer = float64 ? static_cast<const void*>(&beta) : &beta32;
      status = cublasLtMatmul(lt, desc, alpha_pointer, a_pointer, a_layout, b_pointer, b_layout, beta_pointer,
                              d_pointer, d_layout, d_pointer, d_layout, &algorithm.algo, workspace_pointer,
                              workspace ? workspace_bytes : 0, nullptr);
      if (status == CUBLAS_STATUS_SUCCESS) result = download_as(out, d_pointer, c.size());
    }
    cublasLtMatmulPreferenceDestroy(preference);
    for (const cublasLtMatrixLayout_t made : {a_layout, b_layout, d_layout}) cublasLtMatrixLayoutDestroy(made);
    cublasLtMatmulDescDestroy(desc);
    EXPECT_EQ(cublasDestroy(handle), CUBLAS_STATUS_SUCCESS);

    expected.assign(c.size(), NAN);
    for (std::size_t z = 0; z < count; ++z) {
      for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) {
          double sum = 0;
          for (std::size_t p = 0; p < k; ++p) {
            sum += encoded(in, a[z * lda * a_cols + (transpose_a ? i * lda + p : p * lda + i)]) *
                   encoded(in, b[z * ldb * b_cols + (transpose_b ? p * ldb + j : j * ldb + p)]);
          }
          const std::size_t at = (z * n + j) * ldd + i;
          expected[at] =
              alpha * sum + (beta == 0 ? 0 : beta * encoded(out, c[at])) + (bias ? encoded(out, bias_values[i]) : 0);
        }
      }
    }
    return status;
  }

  void expect_right() {
    ASSERT_EQ(run(), CUBLAS_STATUS_SUCCESS);
    const double unit = out == CUDA_R_16BF ? 0x1p-8 : out == CUDA_R_16F ? 0x1p-11 : out == CUDA_R_32F ? 0x1p-24 : 1e-14;
    for (std::size_t i = 0; i < result.size(); ++i) {
      if (std::isnan(expected[i])) continue;  // between columns
      ASSERT_NEAR(result[i], expected[i], 1.01 * unit * std::fabs(expected[i]) + 1e-14) << i;
    }
  }
};

TEST_F(CudaSimTest, MatmulOfEveryTypeAndOrientation) {
  for (const auto& [in, out] : {std::pair{CUDA_R_16BF, CUDA_R_16BF},
                                {CUDA_R_16BF, CUDA_R_32F},
                                {CUDA_R_16F, CUDA_R_16F},
                                {CUDA_R_16F, CUDA_R_32F},
                                {CUDA_R_32F, CUDA_R_32F},
                                {CUDA_R_64F, CUDA_R_64F}}) {
    for (int variant = 0; variant < 16; ++variant) {
      Matmul product{.in = in, .out = out, .transpose_a = (variant & 1) != 0, .transpose_b = (variant & 2) != 0};
      product.bias = (variant & 4) != 0;
      product.batch = variant & 8 ? 3 : 1;
      product.alpha = 1.5;
      product.beta = variant % 3 == 0 ? 0 : -0.5;
      SCOPED_TRACE(::testing::Message() << in << " to " << out << ", variant " << variant);
      product.expect_right();
    }
  }
}

TEST_F(CudaSimTest, MatmulRoundsPartsOfASumWhereItMay) {
  Matmul product{.out = CUDA_R_16BF, .beta = 1};
  product.expect_right();
  const std::vector<double> rounded_once = product.result;
  product.schemes = CUBLASLT_REDUCTION_SCHEME_MASK;
  EXPECT_EQ(product.run(), CUBLAS_STATUS_SUCCESS);
  EXPECT_NE(product.result, rounded_once);
}

TEST_F(CudaSimTest, MatmulRefusesWhatIsWrong) {
  EXPECT_EQ(Matmul{.wrong_ld = -4}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(Matmul{.m = 0}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(Matmul{.offset = 8}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(Matmul{.workspace = false}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ((Matmul{.in = CUDA_R_32F, .out = CUDA_R_16BF}.run()), CUBLAS_STATUS_NOT_SUPPORTED);
  EXPECT_EQ((Matmul{.in = CUDA_R_16F, .out = CUDA_R_16BF}.run()), CUBLAS_STATUS_NOT_SUPPORTED);
}

TEST_F(CudaSimTest, MatmulThatReadsOutside) {
  EXPECT_DEATH((Matmul{.wrong_ld = 4}.run()), "cublasLtMatmul: A touches");
  EXPECT_DEATH((Matmul{.alignment = 1, .offset = 8}.run()), "cublasLtMatmul: A touches");
}

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
