// The simulated cublasLtMatmul, cublasGemmEx and cublasGemmStridedBatchedEx against formulas, what they refuse, and the
// ways of real ones that a test can ask for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cublasLt.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "support/cuda_sim_case.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

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

enum class Through { lt, gemm, strided_gemm };

/// A product with all that it takes, to be changed before it is called.
struct Matmul {
  cudaDataType in = CUDA_R_16BF, out = CUDA_R_32F;
  Through through = Through::lt;
  bool transpose_a = false, transpose_b = false, bias = false;
  int batch = 1;
  double alpha = 1, beta = 0;
  double a_scale = 1, b_scale = 1;  // of the elements
  std::uint32_t alignment = 16, schemes = CUBLASLT_REDUCTION_SCHEME_NONE;
  bool tf32 = false;
  cublasMath_t math = CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
  std::int64_t extra_ld = 3;              // of all
  std::int64_t wrong_ld = 0;              // added to what is said of A
  std::size_t offset = 0;                 // bytes that A is said to lie behind where it does
  std::size_t a_lead = 0, bias_lead = 0;  // elements that lie before the first, from an aligned address
  bool workspace = true;
  std::uint64_t m = 7, n = 5, k = 9;

  int found = 0;  // algorithms
  std::vector<double> result = {}, a = {}, b = {}, c = {}, bias_values = {};

  std::int64_t a_rows() const { return static_cast<std::int64_t>(transpose_a ? k : m); }
  std::int64_t a_cols() const { return static_cast<std::int64_t>(transpose_a ? m : k); }
  std::int64_t b_rows() const { return static_cast<std::int64_t>(transpose_b ? n : k); }
  std::int64_t b_cols() const { return static_cast<std::int64_t>(transpose_b ? k : n); }
  std::int64_t lda() const { return a_rows() + extra_ld; }
  std::int64_t ldb() const { return b_rows() + extra_ld; }
  std::int64_t ldd() const { return static_cast<std::int64_t>(m) + extra_ld; }
  bool float64() const { return in == CUDA_R_64F; }
  cublasComputeType_t compute() const {
    return float64() ? CUBLAS_COMPUTE_64F : tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  }

  cublasStatus_t run() {
    Random random(3);
    const auto numbers = [&](std::int64_t count, cudaDataType type, double scale) {
      std::vector<double> values(static_cast<std::size_t>(count));
      for (double& value : values) value = encoded(type, scale * random.normal());
      return values;
    };
    a = numbers(batch * lda() * a_cols(), in, a_scale);
    b = numbers(batch * ldb() * b_cols(), in, b_scale);
    c = numbers(batch * ldd() * static_cast<std::int64_t>(n), out, 1);
    bias_values = numbers(static_cast<std::int64_t>(m), out, 1);
    result.clear();
    const unsigned char* a_pointer = upload_behind(a_lead, in, a) + offset;
    const unsigned char* b_pointer = upload_as(in, b);
    unsigned char* d_pointer = beta == 0 ? device_memory<unsigned char>(c.size() * size_of(out)) : upload_as(out, c);
    cublasHandle_t handle;
    EXPECT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
    const float alpha32 = static_cast<float>(alpha), beta32 = static_cast<float>(beta);
    const void* alpha_pointer = float64() ? static_cast<const void*>(&alpha) : &alpha32;
    const void* beta_pointer = float64() ? static_cast<const void*>(&beta) : &beta32;
    const auto call = through == Through::lt ? &Matmul::call_lt : &Matmul::call_gemm;
    const cublasStatus_t status = (this->*call)(handle, alpha_pointer, a_pointer, b_pointer, beta_pointer, d_pointer);
    if (status == CUBLAS_STATUS_SUCCESS && (through != Through::lt || found)) {
      result = download_as(out, d_pointer, c.size());
    }
    EXPECT_EQ(cublasDestroy(handle), CUBLAS_STATUS_SUCCESS);
    return status;
  }

  /// In Sum's arithmetic, of change(element) for every element; NaN between the columns.
  template <class Sum, class Change>
  std::vector<double> formula(Change change) const {
    std::vector<double> values(c.size(), NAN);
    const auto number = [&](double value) { return static_cast<Sum>(change(value)); };
    for (std::int64_t z = 0; z < batch; ++z) {
      for (std::int64_t j = 0; j < static_cast<std::int64_t>(n); ++j) {
        for (std::int64_t i = 0; i < static_cast<std::int64_t>(m); ++i) {
          Sum sum = 0;
          for (std::int64_t p = 0; p < static_cast<std::int64_t>(k); ++p) {
            sum += number(a[z * lda() * a_cols() + (transpose_a ? i * lda() + p : p * lda() + i)]) *
                   number(b[z * ldb() * b_cols() + (transpose_b ? p * ldb() + j : j * ldb() + p)]);
          }
          const std::size_t at = (z * n + j) * ldd() + i;
          Sum value = number(alpha) * sum;
          if (beta != 0) value += number(beta) * number(c[at]);
          if (bias) value += number(bias_values[i]);
          values[at] = value;
        }
      }
    }
    return values;
  }
  std::vector<double> expected() const {
    return formula<double>([](double value) { return value; });
  }

  /// Each product of a sum is rounded once and then in at most k - 1 additions; alpha, beta C and the bias are 3 more.
  /// Among denormals a rounding errs by a part of the least one.
  void expect_right() {
    ASSERT_EQ(run(), CUBLAS_STATUS_SUCCESS);
    const double unit = float64() ? 0x1p-53 : 0x1p-24, least = float64() ? 0x1p-1074 : 0x1p-149;
    const double roundings = 1.01 * static_cast<double>(k + 3);
    const double out_unit = out == CUDA_R_16BF ? 0x1p-8 : out == CUDA_R_16F ? 0x1p-11 : 0;
    const std::vector<double> right = expected(),
                              sizes = formula<double>([](double value) { return std::fabs(value); });
    ASSERT_EQ(result.size(), right.size());
    for (std::size_t i = 0; i < result.size(); ++i) {
      if (std::isnan(right[i])) continue;
      const double bound = roundings * (unit * sizes[i] + least * (std::fabs(alpha) + 1));
      ASSERT_NEAR(result[i], right[i], bound + 1.01 * out_unit * std::fabs(right[i])) << i;
    }
  }

  template <class Holds>
  void expect_all(Holds holds) {
    ASSERT_EQ(run(), CUBLAS_STATUS_SUCCESS);
    const std::vector<double> right = expected();
    for (std::size_t i = 0; i < result.size(); ++i) {
      EXPECT_TRUE(std::isnan(right[i]) || holds(result[i])) << result[i] << " instead of " << right[i];
    }
  }

 private:
  static unsigned char* upload_behind(std::size_t lead, cudaDataType type, std::vector<double> values) {
    values.insert(values.begin(), lead, NAN);
    return upload_as(type, values) + lead * size_of(type);
  }

  cublasStatus_t call_lt(cublasHandle_t handle, const void* alpha_pointer, const void* a_pointer, const void* b_pointer,
                         const void* beta_pointer, void* d_pointer) {
    const auto lt = reinterpret_cast<cublasLtHandle_t>(handle);
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulDescCreate(&desc, compute(), float64() ? CUDA_R_64F : CUDA_R_32F);
    const std::int32_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op_a, sizeof op_a);
    cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &op_b, sizeof op_b);
    if (bias) {
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      const void* bias_pointer = upload_behind(bias_lead, out, bias_values);
      cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
      cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias_pointer, sizeof bias_pointer);
    }
    const auto layout = [&](cudaDataType type, std::int64_t rows, std::int64_t cols, std::int64_t ld,
                            std::int64_t stride) {
      cublasLtMatrixLayout_t made;
      cublasLtMatrixLayoutCreate(&made, type, rows, cols, ld);
      const std::int32_t batches = batch;
      cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batches, sizeof batches);
      cublasLtMatrixLayoutSetAttribute(made, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof stride);
      return made;
    };
    const cublasLtMatrixLayout_t a_layout = layout(in, a_rows(), a_cols(), lda() + wrong_ld, lda() * a_cols());
    const cublasLtMatrixLayout_t b_layout = layout(in, b_rows(), b_cols(), ldb(), ldb() * b_cols());
    const cublasLtMatrixLayout_t d_layout = layout(out, m, n, ldd(), ldd() * n);
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
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(lt, desc, a_layout, b_layout, d_layout, d_layout, preference,
                                                           1, &algorithm, &found);
    if (status == CUBLAS_STATUS_SUCCESS && found) {
      char* workspace_pointer = workspace ? device_memory<char>(workspace_bytes) : nullptr;
      status = cublasLtMatmul(lt, desc, alpha_pointer, a_pointer, a_layout, b_pointer, b_layout, beta_pointer,
                              d_pointer, d_layout, d_pointer, d_layout, &algorithm.algo, workspace_pointer,
                              workspace ? workspace_bytes : 0, nullptr);
    }
    cublasLtMatmulPreferenceDestroy(preference);
    for (const cublasLtMatrixLayout_t made : {a_layout, b_layout, d_layout}) cublasLtMatrixLayoutDestroy(made);
    cublasLtMatmulDescDestroy(desc);
    return status;
  }

  cublasStatus_t call_gemm(cublasHandle_t handle, const void* alpha_pointer, const void* a_pointer,
                           const void* b_pointer, const void* beta_pointer, void* d_pointer) {
    expect_success(cudaDeviceSynchronize());  // the stream does not wait for what is uploaded
    cudaStream_t stream;
    expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    EXPECT_EQ(cublasSetStream(handle, stream), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasSetMathMode(handle, math), CUBLAS_STATUS_SUCCESS);
    const auto op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    const int rows = static_cast<int>(m), cols = static_cast<int>(n), inner = static_cast<int>(k);
    const int a_ld = static_cast<int>(lda() + wrong_ld), b_ld = static_cast<int>(ldb()), d_ld = static_cast<int>(ldd());
    const cublasStatus_t status =
        through == Through::gemm
            ? cublasGemmEx(handle, op_a, op_b, rows, cols, inner, alpha_pointer, a_pointer, in, a_ld, b_pointer, in,
                           b_ld, beta_pointer, d_pointer, out, d_ld, compute(), CUBLAS_GEMM_DEFAULT)
            : cublasGemmStridedBatchedEx(handle, op_a, op_b, rows, cols, inner, alpha_pointer, a_pointer, in, a_ld,
                                         lda() * a_cols(), b_pointer, in, b_ld, ldb() * b_cols(), beta_pointer,
                                         d_pointer, out, d_ld, ldd() * cols, batch, compute(), CUBLAS_GEMM_DEFAULT);
    const bool queued = status == CUBLAS_STATUS_SUCCESS && m > 0 && n > 0 && batch > 0;
    EXPECT_EQ(cudaStreamQuery(stream), queued ? cudaErrorNotReady : cudaSuccess);
    expect_success(cudaStreamSynchronize(stream));
    expect_success(cudaStreamDestroy(stream));
    return status;
  }
};

constexpr std::pair<cudaDataType, cudaDataType> kTypes[] = {
    {CUDA_R_16BF, CUDA_R_16BF}, {CUDA_R_16BF, CUDA_R_32F}, {CUDA_R_16F, CUDA_R_16F},
    {CUDA_R_16F, CUDA_R_32F},   {CUDA_R_32F, CUDA_R_32F},  {CUDA_R_64F, CUDA_R_64F},
};

TEST_F(CudaSimTest, MatmulOfEveryTypeAndOrientation) {
  for (const Through through : {Through::lt, Through::gemm, Through::strided_gemm}) {
    for (const auto& [in, out] : kTypes) {
      for (int variant = 0; variant < 16; ++variant) {
        Matmul product{.in = in, .out = out, .through = through};
        product.transpose_a = (variant & 1) != 0;
        product.transpose_b = (variant & 2) != 0;
        product.bias = through == Through::lt && (variant & 4) != 0;
        product.batch = through != Through::gemm && variant & 8 ? 3 : 1;
        product.alpha = 1.5;
        product.beta = variant % 3 == 0 ? 0 : -0.5;
        SCOPED_TRACE(::testing::Message() << in << " to " << out << ", variant " << variant);
        product.expect_right();
      }
    }
  }
}

// ---- Sums in f32 ----------------------------------------------------------------------------------------------------

TEST_F(CudaSimTest, MatmulAddsInFloatInOrder) {
  for (const Through through : {Through::lt, Through::gemm}) {
    for (const auto& [in, out] : kTypes) {
      if (in == CUDA_R_64F) continue;
      Matmul product{.in = in, .out = out, .through = through, .bias = through == Through::lt};
      product.alpha = 1.1f;
      product.beta = -0.3f;
      product.k = 100;
      ASSERT_EQ(product.run(), CUBLAS_STATUS_SUCCESS);
      const std::vector<double> sums = product.formula<float>([](double value) { return value; });
      for (std::size_t i = 0; i < sums.size(); ++i) {
        if (std::isnan(sums[i])) continue;
        ASSERT_EQ(product.result[i], encoded(out, sums[i])) << in << " to " << out;
      }
    }
  }
}

// A scale that is left to alpha comes too late, a scaled operand does not.
TEST_F(CudaSimTest, MatmulLosesWhatASumCannotHold) {
  const auto is_lost = [](double value) { return !std::isfinite(value); };
  const auto is_zero = [](double value) { return value == 0; };
  for (const Through through : {Through::lt, Through::gemm}) {
    const Matmul f32{.in = CUDA_R_32F, .through = through};
    for (const double power : {0x1p100, 0x1p-100}) {
      Matmul product = f32;
      product.alpha = 1 / power;
      product.a_scale = power;
      product.expect_right();
      product.b_scale = power > 1 ? 0x1p40 : 0x1p-60;
      power > 1 ? product.expect_all(is_lost) : product.expect_all(is_zero);
      product.alpha = 1;
      product.a_scale = 1;
      product.expect_right();
      product = f32;
      product.in = product.out = CUDA_R_64F;
      product.alpha = 1 / power;
      product.a_scale = power;
      product.b_scale = 0x1p40;
      product.expect_right();
    }
  }
}

TEST_F(CudaSimTest, MatmulFlushesDenormalsWhereAsked) {
  const Matmul f32{.in = CUDA_R_32F};
  Matmul read = f32, written = f32, summed = f32, of_halves{};
  read.a_scale = 0x1p-140;
  read.b_scale = 0x1p100;
  written.a_scale = written.b_scale = 0x1p-60;
  written.alpha = 0x1p-20;
  summed.a_scale = summed.b_scale = 0x1p-70;
  summed.alpha = 0x1p60;
  of_halves.a_scale = 0x1p-132;  // denormal in bf16 as in f32
  of_halves.b_scale = 0x1p100;
  for (Matmul* product : {&read, &written, &summed, &of_halves}) product->expect_right();
  cuda_sim::set_flush_denormals(true);
  of_halves.expect_right();
  for (Matmul* product : {&read, &written, &summed}) {
    product->expect_all([](double value) { return value == 0; });
  }
}

TEST_F(CudaSimTest, MatmulRoundsPartsOfASumWhereItMay) {
  for (const Through through : {Through::lt, Through::gemm}) {
    Matmul product{.out = CUDA_R_16BF, .through = through, .beta = 1};
    product.expect_right();
    const std::vector<double> rounded_once = product.result;
    product.schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    product.expect_right();
    product.schemes = CUBLASLT_REDUCTION_SCHEME_MASK;
    product.math = CUBLAS_DEFAULT_MATH;
    EXPECT_EQ(product.run(), CUBLAS_STATUS_SUCCESS);
    EXPECT_NE(product.result, rounded_once);
  }
}

TEST_F(CudaSimTest, MatmulRoundsASumBeforeItsBiasWhereItMaySplitIt) {
  Matmul product{.out = CUDA_R_16BF, .bias = true};
  product.expect_right();
  const std::vector<double> rounded_once = product.result;
  product.schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  EXPECT_EQ(product.run(), CUBLAS_STATUS_SUCCESS);
  EXPECT_NE(product.result, rounded_once);
}

TEST_F(CudaSimTest, MatmulInTf32) {
  const auto in_tf32 = [](double value) {
    const int last = std::ilogb(value) - 10;
    return std::ldexp(std::trunc(std::ldexp(value, -last)), last);
  };
  const Matmul lt{.in = CUDA_R_32F}, gemm{.in = CUDA_R_32F, .through = Through::gemm};
  Matmul lt_asked = lt, gemm_asked = gemm, gemm_allowed = gemm, pedantic = gemm;
  lt_asked.tf32 = gemm_asked.tf32 = true;
  gemm_allowed.math = CUBLAS_TF32_TENSOR_OP_MATH;
  for (Matmul* product : {&lt_asked, &gemm_asked, &gemm_allowed}) {
    ASSERT_EQ(product->run(), CUBLAS_STATUS_SUCCESS);
    const std::vector<double> sums = product->formula<float>(in_tf32);
    for (std::size_t i = 0; i < sums.size(); ++i) {
      if (std::isnan(sums[i])) continue;
      ASSERT_EQ(product->result[i], sums[i]) << i;
    }
  }
  pedantic.math = CUBLAS_PEDANTIC_MATH;
  pedantic.expect_right();
  EXPECT_EQ((Matmul{.in = CUDA_R_16BF, .tf32 = true}.run()), CUBLAS_STATUS_NOT_SUPPORTED);
}

// ---- What is refused, and what aborts -------------------------------------------------------------------------------

TEST_F(CudaSimTest, MatmulRefusesWhatIsWrong) {
  for (const Through through : {Through::lt, Through::gemm}) {
    const Matmul right{.through = through};
    Matmul wrong = right;
    wrong.wrong_ld = -4;
    EXPECT_EQ(wrong.run(), CUBLAS_STATUS_INVALID_VALUE);
    for (const auto& [in, out] : {std::pair{CUDA_R_32F, CUDA_R_16BF}, {CUDA_R_16F, CUDA_R_16BF}}) {
      wrong = right;
      wrong.in = in;
      wrong.out = out;
      EXPECT_EQ(wrong.run(), CUBLAS_STATUS_NOT_SUPPORTED);
    }
  }
  EXPECT_EQ(Matmul{.m = 0}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(Matmul{.offset = 8}.run(), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(Matmul{.workspace = false}.run(), CUBLAS_STATUS_INVALID_VALUE);
}

TEST_F(CudaSimTest, GemmTakesWhatCublasLtDoesNot) {
  EXPECT_EQ((Matmul{.through = Through::gemm, .m = 0}.run()), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ((Matmul{.through = Through::strided_gemm, .batch = 0}.run()), CUBLAS_STATUS_SUCCESS);
  Matmul{.through = Through::gemm, .a_lead = 1}.expect_right();
  Matmul{.through = Through::gemm, .beta = 0.5, .k = 0}.expect_right();
}

TEST_F(CudaSimTest, GemmRefusesWhatIsWrong) {
  cublasHandle_t handle;
  ASSERT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
  float* const memory = device_memory<float>(16);
  const float one = 1;
  const auto gemm = [&](cublasHandle_t with, int m, int k, const float* alpha, const float* a, int batch) {
    return cublasGemmStridedBatchedEx(with, CUBLAS_OP_N, CUBLAS_OP_N, m, 2, k, alpha, a, CUDA_R_32F, 2, 0, memory,
                                      CUDA_R_32F, 2, 0, &one, memory + 8, CUDA_R_32F, 2, 4, batch, CUBLAS_COMPUTE_32F,
                                      CUBLAS_GEMM_DEFAULT);
  };
  EXPECT_EQ(gemm(handle, 2, 2, &one, memory, 2), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(gemm(nullptr, 2, 2, &one, memory, 2), CUBLAS_STATUS_NOT_INITIALIZED);
  EXPECT_EQ(gemm(handle, -1, 2, &one, memory, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(gemm(handle, 2, -1, &one, memory, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(gemm(handle, 2, 3, &one, memory, 2), CUBLAS_STATUS_INVALID_VALUE);  // B's leading dimension
  EXPECT_EQ(gemm(handle, 3, 2, &one, memory, 2), CUBLAS_STATUS_INVALID_VALUE);  // A's and C's
  EXPECT_EQ(gemm(handle, 2, 2, nullptr, memory, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(gemm(handle, 2, 2, &one, nullptr, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(gemm(handle, 2, 2, &one, memory, -1), CUBLAS_STATUS_INVALID_VALUE);
  cublasMath_t math;
  EXPECT_EQ(cublasSetMathMode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cublasGetMathMode(handle, &math), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(math, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
  EXPECT_EQ(cublasDestroy(handle), CUBLAS_STATUS_SUCCESS);
}

TEST_F(CudaSimTest, MatmulThatReadsOutside) {
  EXPECT_DEATH((Matmul{.wrong_ld = 4}.run()), "cublasLtMatmul: A touches");
  EXPECT_DEATH((Matmul{.alignment = 1, .offset = 8}.run()), "cublasLtMatmul: A touches");
  EXPECT_DEATH((Matmul{.through = Through::gemm, .wrong_ld = 4}.run()), "cublasGemmEx: A touches");
  EXPECT_DEATH((Matmul{.through = Through::strided_gemm, .batch = 2, .wrong_ld = 4}.run()),
               "cublasGemmStridedBatchedEx: A touches");
}

TEST_F(CudaSimTest, MatmulLoadsTheBiasBySixteenBytes) {
  const char* const misaligned = "cublasLtMatmul: bias at .*, a misaligned address: it is loaded by 16 bytes";
  EXPECT_DEATH((Matmul{.bias = true, .bias_lead = 2}.run()), misaligned);
  EXPECT_DEATH((Matmul{.out = CUDA_R_16BF, .bias = true, .bias_lead = 4}.run()), misaligned);
  Matmul{.bias = true, .bias_lead = 4}.expect_right();
  Matmul{.out = CUDA_R_16BF, .bias = true, .bias_lead = 8}.expect_right();
  cuda_sim::set_bias_bytes(4);
  Matmul{.bias = true, .bias_lead = 1}.expect_right();
}

TEST_F(CudaSimTest, NoAlgorithmBelowAnAlignmentOrForASize) {
  using cuda_sim::NoAlgorithm;
  const auto check = [](auto set, Matmul without, Matmul with) {
    without.expect_right();
    set(NoAlgorithm::none_returned);
    EXPECT_EQ(without.run(), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(without.found, 0);
    for (const auto how : {NoAlgorithm::not_supported, NoAlgorithm::refused_later}) {
      set(how);
      EXPECT_EQ(without.run(), CUBLAS_STATUS_NOT_SUPPORTED);
      EXPECT_EQ(without.found, how == NoAlgorithm::refused_later ? 1 : 0);
    }
    with.expect_right();
    cuda_sim::reset_libraries();
  };
  check([](NoAlgorithm how) { cuda_sim::set_no_algorithm_below(16, how); }, {.alignment = 8}, {.alignment = 16});
  check([](NoAlgorithm how) { cuda_sim::set_no_algorithm_for(9, how); }, {.m = 9}, {.m = 7});
}

TEST_F(CudaSimTest, LibrariesAreAsAtFirstAfterReset) {
  cuda_sim::set_flush_denormals(true);
  cuda_sim::set_bias_bytes(32);
  cuda_sim::set_no_algorithm_below(256);
  cuda_sim::set_no_algorithm_for(7);
  cuda_sim::reset_libraries();
  Matmul product{.in = CUDA_R_32F, .bias = true, .a_scale = 0x1p-140, .b_scale = 0x1p120};
  product.bias_lead = 4;
  product.alignment = 4;
  product.expect_right();
}

}  // namespace
}  // namespace pissa::test
