// The simulated cuBLAS, cuBLASLt and cuSOLVER: what they refuse, what aborts, and the ways of real ones that a test can
// ask for. That they compute what they say, the tests of the backend need.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "cublasLt.h"
#include "cusolverDn.h"
#include "support/cuda_sim_case.h"
#include "support/formats.h"

namespace pissa::test {
namespace {

using cuda_sim::OnNaN;

cublasHandle_t blas() {
  static const cublasHandle_t handle = [] {
    cublasHandle_t made;
    EXPECT_EQ(cublasCreate(&made), CUBLAS_STATUS_SUCCESS);
    return made;
  }();
  return handle;
}

// ---- Products -------------------------------------------------------------------------------------------------------

enum class Through { lt, gemm };
constexpr Through kBoth[] = {Through::lt, Through::gemm};

/// D [m, 5] = alpha A B + C, and a bias if there is one: every element of A, of B, and so on, is the same number.
struct Matmul {
  Through through = Through::lt;
  Format in = Format::f32, out = Format::f32;
  double a = 1, b = 1, c = 0, bias = 0;
  float alpha = 1;
  std::uint32_t alignment = 16, schemes = CUBLASLT_REDUCTION_SCHEME_NONE;
  bool tf32 = false;
  cublasMath_t math = CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  std::int64_t wrong_ld = 0;               // added to what is said of A
  std::int64_t a_lead = 0, bias_lead = 0;  // elements between an aligned address and the first
  bool workspace = true;
  std::int64_t m = 7;

  int found = 0;      // algorithms
  double result = 0;  // each element of D

  static constexpr std::int64_t kN = 5, kK = 9;

  cublasStatus_t run() {
    const std::uint8_t* a_data = stored(in, a, m * kK, a_lead);
    const std::uint8_t* b_data = stored(in, b, kK * kN);
    std::uint8_t* d_data = stored(out, c, m * kN);
    const float beta = c == 0 ? 0 : 1;
    const auto call = through == Through::lt ? &Matmul::call_lt : &Matmul::call_gemm;
    const cublasStatus_t status = (this->*call)(a_data, b_data, &beta, d_data);
    const std::vector<std::uint8_t> bytes = download(d_data, static_cast<std::size_t>(m * kN * element_size(out)));
    result = m == 0 ? 0 : read_element(out, bytes.data());
    for (std::int64_t i = 0; i < m * kN; ++i) EXPECT_EQ(read_element(out, &bytes[i * element_size(out)]), result) << i;
    return status;
  }
  double value() {
    EXPECT_EQ(run(), CUBLAS_STATUS_SUCCESS);
    return result;
  }

 private:
  static std::uint8_t* stored(Format format, double value, std::int64_t count, std::int64_t lead = 0) {
    std::vector<std::uint8_t> bytes((lead + count) * element_size(format), 0xff);
    for (std::int64_t i = lead; i < lead + count; ++i) write_element(format, &bytes[i * element_size(format)], value);
    std::uint8_t* at = device_memory<std::uint8_t>(bytes.size()) + lead * element_size(format);
    expect_success(
        cudaMemcpyAsync(at - lead * element_size(format), bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    return at;
  }
  static cudaDataType type_of(Format format) {
    return format == Format::f32 ? CUDA_R_32F : format == Format::bf16 ? CUDA_R_16BF : CUDA_R_16F;
  }
  cublasComputeType_t compute() const { return tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F; }

  cublasStatus_t call_lt(const void* a_data, const void* b_data, const float* beta, void* d_data) {
    const auto lt = reinterpret_cast<cublasLtHandle_t>(blas());
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulDescCreate(&desc, compute(), CUDA_R_32F);
    if (bias != 0) {
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      const void* bias_data = stored(out, bias, m, bias_lead);
      cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
      cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_data, sizeof bias_data);
    }
    cublasLtMatrixLayout_t a_layout, b_layout, d_layout;
    cublasLtMatrixLayoutCreate(&a_layout, type_of(in), m, kK, m + wrong_ld);
    cublasLtMatrixLayoutCreate(&b_layout, type_of(in), kK, kN, kK);
    cublasLtMatrixLayoutCreate(&d_layout, type_of(out), m, kN, m);
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulPreferenceCreate(&preference);
    const std::uint64_t workspace_bytes = 1 << 16;
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes, 8);
    for (const auto which : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      cublasLtMatmulPreferenceSetAttribute(preference, which, &alignment, 4);
    }
    cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &schemes, 4);
    cublasLtMatmulHeuristicResult_t algorithm;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt, desc, a_layout, b_layout, d_layout, d_layout, preference,
                                                           1, &algorithm, &found);
    if (status == CUBLAS_STATUS_SUCCESS && found) {
      const std::size_t bytes = workspace ? workspace_bytes : 0;
      status = cublasLtMatmul(lt, desc, &alpha, a_data, a_layout, b_data, b_layout, beta, d_data, d_layout, d_data,
                              d_layout, &algorithm.algo, device_memory<char>(bytes), bytes, nullptr);
    }
    cublasLtMatmulPreferenceDestroy(preference);
    for (const cublasLtMatrixLayout_t made : {a_layout, b_layout, d_layout}) cublasLtMatrixLayoutDestroy(made);
    cublasLtMatmulDescDestroy(desc);
    return status;
  }

  cublasStatus_t call_gemm(const void* a_data, const void* b_data, const float* beta, void* d_data) {
    EXPECT_EQ(cublasSetMathMode(blas(), math), CUBLAS_STATUS_SUCCESS);
    const int rows = static_cast<int>(m), ld = static_cast<int>(m + wrong_ld);
    return cublasGemmStridedBatchedEx(blas(), CUBLAS_OP_N, CUBLAS_OP_N, rows, kN, kK, &alpha, a_data, type_of(in), ld,
                                      0, b_data, type_of(in), kK, 0, beta, d_data, type_of(out), std::max(rows, 1), 0,
                                      1, compute(), CUBLAS_GEMM_DEFAULT);
  }
};

// In f32: a scale that is left to alpha comes too late, a scaled operand does not.
TEST_F(CudaSimTest, MatmulLosesWhatASumCannotHold) {
  for (const Through through : kBoth) {
    EXPECT_EQ((Matmul{.through = through, .a = 0x1p100, .alpha = 0x1p-100f}.value()), 9);
    EXPECT_EQ((Matmul{.through = through, .a = 0x1p100, .b = 0x1p40, .alpha = 0x1p-100f}.value()), HUGE_VAL);
    EXPECT_EQ((Matmul{.through = through, .a = 0x1p-100, .b = 0x1p-60, .alpha = 0x1p100f}.value()), 0);
  }
}

TEST_F(CudaSimTest, MatmulFlushesDenormalsWhereAsked) {
  const Matmul reads{.a = 0x1p-140, .b = 0x1p100}, sums{.a = 0x1p-70, .b = 0x1p-70, .alpha = 0x1p60f},
      writes{.a = 0x1p-60, .b = 0x1p-60, .alpha = 0x1p-20f}, of_halves{.in = Format::bf16, .a = 0x1p-132, .b = 0x1p100};
  for (const bool flushes : {false, true}) {
    cuda_sim::set_flush_denormals(flushes);
    for (Matmul product : {reads, sums, writes}) EXPECT_EQ(product.value() == 0, flushes);
    EXPECT_EQ(Matmul(of_halves).value(), 9 * 0x1p-32) << "denormal in bf16 as in f32";
  }
}

// Of 9 (1 + 2^-7) - 9, which is 2^-4 + 2^-7; 9 (1 + 2^-7) in bf16 is 9 + 2^-4.
TEST_F(CudaSimTest, MatmulRoundsBeforeItsEndWhereItMay) {
  const double exact = 9 * 0x1p-7, rounded = 0x1p-4;
  Matmul lt{.in = Format::bf16, .out = Format::bf16, .b = 1 + 0x1p-7, .bias = -9}, gemm = lt;
  EXPECT_EQ(lt.value(), exact);
  lt.schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  EXPECT_EQ(lt.value(), rounded) << "before the bias";
  lt.bias = 0, lt.c = -9;
  EXPECT_EQ(lt.value(), exact);
  lt.schemes = CUBLASLT_REDUCTION_SCHEME_MASK;
  EXPECT_NE(lt.value(), exact) << "parts of the sum";
  gemm.through = Through::gemm, gemm.bias = 0, gemm.c = -9;
  EXPECT_EQ(gemm.value(), exact);
  gemm.math = CUBLAS_DEFAULT_MATH;
  EXPECT_NE(gemm.value(), exact);
}

TEST_F(CudaSimTest, MatmulInTf32) {
  const Matmul exact{.a = 1 + 0x1p-11}, of_gemm{.through = Through::gemm, .a = 1 + 0x1p-11};
  Matmul pedantic = of_gemm, asked = exact, gemm_asked = of_gemm, gemm_allowed = of_gemm;
  pedantic.math = CUBLAS_PEDANTIC_MATH;
  asked.tf32 = gemm_asked.tf32 = true;
  gemm_allowed.math = CUBLAS_TF32_TENSOR_OP_MATH;
  for (Matmul product : {exact, of_gemm, pedantic}) EXPECT_EQ(product.value(), 9 + 9 * 0x1p-11);
  for (Matmul product : {asked, gemm_asked, gemm_allowed}) EXPECT_EQ(product.value(), 9);
  EXPECT_EQ((Matmul{.in = Format::bf16, .tf32 = true}.run()), CUBLAS_STATUS_NOT_SUPPORTED);
}

TEST_F(CudaSimTest, NoAlgorithmBelowAnAlignmentOrForASize) {
  using cuda_sim::NoAlgorithm;
  const auto check = [](auto set, Matmul without, Matmul with) {
    for (const auto how : {NoAlgorithm::none_returned, NoAlgorithm::not_supported, NoAlgorithm::refused_later}) {
      set(how);
      const bool returned = how == NoAlgorithm::none_returned;
      EXPECT_EQ(without.run(), returned ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED);
      EXPECT_EQ(without.found, how == NoAlgorithm::refused_later ? 1 : 0);
      EXPECT_EQ(with.value(), 9);
    }
    cuda_sim::reset_libraries();
    EXPECT_EQ(without.value(), 9);
  };
  check([](NoAlgorithm how) { cuda_sim::set_no_algorithm_below(16, how); }, {.alignment = 8}, {.alignment = 16});
  check([](NoAlgorithm how) { cuda_sim::set_no_algorithm_for(9, how); }, {.m = 9}, {.m = 7});
}

TEST_F(CudaSimTest, WhatAMatmulRefusesOrTakes) {
  for (const Through through : kBoth) {
    EXPECT_EQ((Matmul{.through = through, .wrong_ld = -1}.run()), CUBLAS_STATUS_INVALID_VALUE);
    EXPECT_EQ((Matmul{.through = through, .out = Format::bf16}.run()), CUBLAS_STATUS_NOT_SUPPORTED);
    EXPECT_EQ((Matmul{.through = through, .in = Format::f16, .out = Format::bf16}.run()), CUBLAS_STATUS_NOT_SUPPORTED);
  }
  EXPECT_EQ(Matmul{.m = 0}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(Matmul{.a_lead = 2}.run(), CUBLAS_STATUS_INVALID_VALUE) << "A's alignment is less than was claimed";
  EXPECT_EQ(Matmul{.workspace = false}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ((Matmul{.through = Through::gemm, .wrong_ld = 1, .m = 0}.run()), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ((Matmul{.through = Through::gemm, .in = Format::bf16, .a_lead = 1}.value()), 9);
  for (const std::int64_t lead : {4, 8}) EXPECT_EQ((Matmul{.bias = 1, .bias_lead = lead}.value()), 10);
}

TEST_F(CudaSimTest, WhereAMatmulAborts) {
  const char* const misaligned = "cublasLtMatmul: bias at .*, a misaligned address: it is loaded by 16 bytes";
  EXPECT_DEATH((Matmul{.bias = 1, .bias_lead = 2}.run()), misaligned);
  EXPECT_DEATH((Matmul{.wrong_ld = 4}.run()), "cublasLtMatmul: A touches");
  EXPECT_DEATH((Matmul{.through = Through::gemm, .wrong_ld = 4}.run()), "cublasGemmStridedBatchedEx: A touches");
}

// ---- Factorisations -------------------------------------------------------------------------------------------------

/// Calls on a matrix [3, 3] of which the upper triangle, with the diagonal 4, 4, 4, is read by Cholesky.
class SolverTest : public CudaSimTest {
 public:
  static constexpr int kN = 3;

  void SetUp() override {
    CudaSimTest::SetUp();
    static const cusolverDnHandle_t made = [] {
      cusolverDnHandle_t handle;
      EXPECT_EQ(cusolverDnCreate(&handle), CUSOLVER_STATUS_SUCCESS);
      return handle;
    }();
    solver = made;
  }
  /// Of a batch of two, the second of which is this.
  cusolverStatus_t potrf() {
    pointers = upload(std::vector<double*>{upload(std::vector<double>{4, 9, 9, 0, 4, 9, 0, 0, 4}), upload(matrix)});
    return cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_UPPER, kN, pointers, kN, info, 2);
  }
  cusolverStatus_t geqrf() { return geqrf(64 + 32 * kN); }
  cusolverStatus_t geqrf(int lwork) {
    int needed = 0;
    EXPECT_EQ(cusolverDnDgeqrf_bufferSize(solver, kN, kN, a = upload(matrix), kN, &needed), CUSOLVER_STATUS_SUCCESS);
    EXPECT_EQ(needed, 64 + 32 * kN);
    return cusolverDnDgeqrf(solver, kN, kN, a, kN, tau, device_memory<double>(needed), lwork, info + 1);
  }
  cusolverStatus_t orgqr() {
    const int lwork = 64 + 32 * kN;
    return cusolverDnDorgqr(solver, kN, kN, kN, a = upload(matrix), kN, upload(std::vector<double>(kN, 0.5)),
                            device_memory<double>(lwork), lwork, info + 1);
  }
  cublasStatus_t trsm() {
    const double one = 1;
    pointers = upload(std::vector<double*>{upload(matrix)});
    return cublasDtrsmBatched(blas(), CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, kN,
                              kN, &one, pointers, kN, pointers, kN, 1);
  }
  std::vector<double> second_of_batch() {
    return download(download(static_cast<double* const*>(pointers), 2)[1], kN * kN);
  }

  cusolverDnHandle_t solver;
  std::vector<double> matrix{4, 9, 9, 1, 4, 9, 1, 1, 4};
  double *a = nullptr, *tau = device_memory<double>(kN);
  double** pointers = nullptr;
  int* info = upload(std::vector<int>{77, 77});
};

TEST_F(SolverTest, CholeskyLosesTheOtherTriangleAndNamesABadPivot) {
  EXPECT_EQ(potrf(), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(download(info, 2), (std::vector<int>{0, 0}));
  for (const int at : {1, 2, 5}) EXPECT_TRUE(std::isnan(second_of_batch()[at])) << at;
  EXPECT_EQ(second_of_batch()[3], 0.5);
  matrix[4] = -1;
  EXPECT_EQ(potrf(), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(download(info, 2), (std::vector<int>{0, 2}));
}

// X U = B, for U the upper triangle of B itself: the identity in it, and whole numbers below.
TEST_F(SolverTest, ATriangleIsSolvedFor) {
  matrix = {2, 77, 77, 4, 1, 77, 6, 3, 4};
  double *u = upload(matrix), *b = upload(std::vector<double>{2, 4, 6, 5, 10, 15, 13, 26, 43});
  double **left = upload(std::vector<double*>{u}), **right = upload(std::vector<double*>{b});
  const double two = 2;
  EXPECT_EQ(cublasDtrsmBatched(blas(), CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N, CUBLAS_DIAG_NON_UNIT, kN,
                               kN, &two, left, kN, right, kN, 1),
            CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(download(b, 9), (std::vector<double>{2, 4, 6, 2, 4, 6, 2, 4, 8}));
}

// Also where the data is still on its way, and fresh memory is NaN, when the solver is called; and nobody waits for it.
TEST_F(SolverTest, WhatNaNLeadsToIsWhatWasAskedFor) {
  struct Row {
    const char* name;
    cusolverStatus_t (SolverTest::*call)();
    int info;    // LAPACK's where an element is NaN
    bool stops;  // before the last element
  };
  const Row rows[] = {{"potrf", &SolverTest::potrf, 2, true},
                      {"geqrf", &SolverTest::geqrf, 0, false},
                      {"orgqr", &SolverTest::orgqr, 0, false}};
  for (const auto& [name, call, its_info, stops] : rows) {
    for (const bool nan : {false, true}) {
      matrix[call == &SolverTest::orgqr ? 1 : 4] = nan ? NAN : 4;
      for (const auto mode : {OnNaN::info, OnNaN::info_zero, OnNaN::status}) {
        SCOPED_TRACE(::testing::Message() << name << ", " << nan << ", " << static_cast<int>(mode));
        cuda_sim::set_solver_on_nan(mode);
        info = upload(std::vector<int>{77, 77});
        const auto waits = cuda_sim::synchronizations();
        const bool fails = nan && mode == OnNaN::status;
        EXPECT_EQ((this->*call)(), fails ? CUSOLVER_STATUS_EXECUTION_FAILED : CUSOLVER_STATUS_SUCCESS);
        EXPECT_EQ(cuda_sim::synchronizations(), waits);
        EXPECT_EQ(download(info, 2)[1], fails ? 77 : nan && mode == OnNaN::info ? its_info : 0);
        const double last = call == &SolverTest::potrf ? second_of_batch()[8] : download(a, 9)[8];
        EXPECT_EQ(std::isnan(last), nan && !fails && !(stops && mode == OnNaN::info));
        EXPECT_EQ(last == 4, fails || (nan && stops && mode == OnNaN::info)) << "untouched";
      }
    }
  }
  cuda_sim::reset_libraries();
  EXPECT_EQ(geqrf(), CUSOLVER_STATUS_SUCCESS);
}

TEST_F(SolverTest, WhatIsRefusedAndWhatAborts) {
  EXPECT_EQ(geqrf(63 + 32 * kN), CUSOLVER_STATUS_INVALID_VALUE) << "too little workspace";
  EXPECT_EQ(cusolverDnDorgqr(solver, kN, kN, kN - 1, a, kN, tau, a, 1000, info), CUSOLVER_STATUS_INVALID_VALUE);
  EXPECT_EQ(cusolverDnDpotrfBatched(nullptr, CUBLAS_FILL_MODE_UPPER, kN, pointers, kN, info, 2),
            CUSOLVER_STATUS_NOT_INITIALIZED);
  EXPECT_EQ(cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_UPPER, kN, pointers, kN - 1, info, 2),
            CUSOLVER_STATUS_INVALID_VALUE);
  matrix.pop_back();
  EXPECT_DEATH((potrf(), cudaDeviceSynchronize()), "cusolverDnDpotrfBatched: A touches");
  EXPECT_DEATH((trsm(), cudaDeviceSynchronize()), "cublasDtrsmBatched: A touches");
}

// The product's tests have a handle of cuBLAS; a stream of another device, and memory of another, are refused or found.
TEST_F(SolverTest, HandlesAreForTheDeviceThatWasCurrent) {
  blas();
  EXPECT_EQ(potrf(), CUSOLVER_STATUS_SUCCESS);
  expect_success(cudaDeviceSynchronize());
  expect_success(cudaSetDevice(1));
  EXPECT_EQ(potrf(), CUSOLVER_STATUS_EXECUTION_FAILED);
  EXPECT_EQ(trsm(), CUBLAS_STATUS_EXECUTION_FAILED);
  const cudaStream_t other = make_stream();
  double** others = upload(std::vector<double*>{upload(matrix), upload(matrix)});
  expect_success(cudaDeviceSynchronize());
  expect_success(cudaSetDevice(0));
  EXPECT_EQ(cublasSetStream(blas(), other), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cusolverDnSetStream(solver, other), CUSOLVER_STATUS_INVALID_VALUE);
  const auto factor = [&] {
    cusolverDnDpotrfBatched(solver, CUBLAS_FILL_MODE_UPPER, kN, others, kN, info, 1);
    cudaDeviceSynchronize();
  };
  EXPECT_DEATH(factor(), "runs on device 0 and touches memory of device 1");
}

// n^3 / 3 of Cholesky, m n^2 of a triangle, 2 n^2 (m - n / 3) of QR. A call that fails is not there.
TEST_F(SolverTest, TheLedgerHasTheirOperations) {
  cuda_sim::reset_ledger();
  potrf(), trsm(), geqrf(), orgqr();
  cuda_sim::fail_next(CUSOLVER_STATUS_INTERNAL_ERROR);
  EXPECT_NE(potrf(), CUSOLVER_STATUS_SUCCESS);
  std::vector<double> flops;
  for (const cuda_sim::Entry& entry : cuda_sim::ledger()) {
    if (entry.kind == cuda_sim::Kind::library) flops.push_back(entry.flops);
  }
  EXPECT_EQ(flops, (std::vector<double>{2 * 9, 27, 36, 36}));
}

}  // namespace
}  // namespace pissa::test
