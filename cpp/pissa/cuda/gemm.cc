#include "pissa/cuda/gemm.h"

#include <cublasLt.h>

#include <bit>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "pissa/cuda/elementwise.h"

namespace pissa::cuda {
namespace {

// What NVIDIA recommends for Hopper. Freed after the call, on its stream: torch's allocator hands it out again.
constexpr std::int64_t kWorkspaceBytes = 32 << 20;

// An operand as BLAS sees it: column-major, so a row-major matrix is its own transpose.
struct BlasOperand {
  const void* data;
  cudaDataType_t type;
  std::int64_t rows, cols, ld, stride;
  cublasOperation_t op = CUBLAS_OP_N;
};

cudaDataType_t type_of(Format format) {
  return format == Format::f32 ? CUDA_R_32F : format == Format::bf16 ? CUDA_R_16BF : CUDA_R_16F;
}

BlasOperand operand(const Matrix& matrix, Op op = Op::n) {
  return {matrix.data,
          type_of(matrix.format),
          matrix.cols,
          matrix.rows,
          matrix.ld,
          matrix.stride,
          op == Op::n ? CUBLAS_OP_N : CUBLAS_OP_T};
}

BlasOperand operand(const WideMatrix& matrix, Op op = Op::n) {
  return {matrix.data,
          CUDA_R_64F,
          matrix.cols,
          matrix.rows,
          matrix.ld,
          matrix.stride,
          op == Op::n ? CUBLAS_OP_N : CUBLAS_OP_T};
}

// Of a pointer and of the distances between columns and matrices: what a kernel may rely on.
std::uint32_t alignment(const BlasOperand& operand) {
  const std::int64_t size = operand.type == CUDA_R_64F ? 8 : operand.type == CUDA_R_32F ? 4 : 2;
  const std::uint64_t all = reinterpret_cast<std::uintptr_t>(operand.data) |
                            static_cast<std::uint64_t>((operand.ld | operand.stride) * size) | 256u;
  return 1u << std::countr_zero(all);
}

// Owner of one of cublasLt's descriptions.
template <class T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, cublasStatus_t (*)(T)>;

// While it lives, the handle's own products sum in f32 from factors that keep their digits. Torch's handle may allow
// less.
class PreciseMath {
 public:
  explicit PreciseMath(const Context& context) : context_(context) {
    check(cublasGetMathMode(context.blas, &before_), context, "cublasGetMathMode");
    check(cublasSetMathMode(context.blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION), context,
          "cublasSetMathMode");
  }
  PreciseMath(const PreciseMath&) = delete;
  ~PreciseMath() { cublasSetMathMode(context_.blas, before_); }

 private:
  const Context& context_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

class Product {
 public:
  Product(const Context& context, cublasComputeType_t compute, cudaDataType_t scale_type, const BlasOperand& left,
          const BlasOperand& right, const BlasOperand& out, std::int64_t count)
      : context_(context),
        left_(left),
        right_(right),
        out_(out),
        count_(count),
        compute_(compute),
        description_(
            make<cublasLtMatmulDesc_t>("cublasLtMatmulDescCreate", cublasLtMatmulDescDestroy,
                                       [&](auto* to) { return cublasLtMatmulDescCreate(to, compute, scale_type); })),
        layouts_{layout(left, count), layout(right, count), layout(out, count)} {
    set(CUBLASLT_MATMUL_DESC_TRANSA, left.op);
    set(CUBLASLT_MATMUL_DESC_TRANSB, right.op);
  }

  // A vector along the columns of the row-major output.
  void add_bias(const void* bias, cudaDataType_t type) {
    has_bias_ = true;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type);
  }

  // False, and nothing is computed, where cublasLt knows no way. Of operands at 2 bytes and others at more it may say
  // so only here.
  bool run(const void* alpha, const void* beta) const {
    const auto best = algorithm();
    if (!best) return false;
    const Array<char> workspace(context_, static_cast<std::int64_t>(best->workspaceSize));
    const cublasStatus_t status =
        cublasLtMatmul(lt_handle(), description_.get(), alpha, left_.data, layouts_[0].get(), right_.data,
                       layouts_[1].get(), beta, out_.data, layouts_[2].get(), const_cast<void*>(out_.data),
                       layouts_[2].get(), &best->algo, workspace.data(), best->workspaceSize, context_.stream);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return false;
    verify(status, "cublasLtMatmul");
    return true;
  }

  // None where cublasLt knows none, as it may for operands that are not at 16 bytes.
  std::optional<cublasLtMatmulHeuristicResult_t> algorithm() const {
    const auto preference =
        make<cublasLtMatmulPreference_t>("cublasLtMatmulPreferenceCreate", cublasLtMatmulPreferenceDestroy,
                                         [](auto* to) { return cublasLtMatmulPreferenceCreate(to); });
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      verify(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
             "cublasLtMatmulPreferenceSetAttribute");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(kWorkspaceBytes));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(left_));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(right_));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out_));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out_));
    // Parts of a sum are added in f32: the other schemes do so in the output's type. With a bias there are no parts:
    // split-K adds it after it has rounded their sum to that type (pytorch#180875), under which schemes nobody says.
    const auto schemes = has_bias_ ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(schemes));
    cublasLtMatmulHeuristicResult_t best{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(lt_handle(), description_.get(), layouts_[0].get(), layouts_[1].get(),
                                       layouts_[2].get(), layouts_[2].get(), preference.get(), 1, &best, &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) verify(status, "cublasLtMatmulAlgoGetHeuristic");
    if (status == CUBLAS_STATUS_NOT_SUPPORTED || found == 0) return {};
    return best;
  }

  // At any alignment, without a bias.
  void run_by_handle(const void* alpha, const void* beta) const {
    const PreciseMath precise(context_);
    const auto number = [](std::int64_t n) { return static_cast<int>(n); };
    verify(cublasGemmStridedBatchedEx(context_.blas, left_.op, right_.op, number(out_.rows), number(out_.cols),
                                      number(inner()), alpha, left_.data, left_.type, number(left_.ld), left_.stride,
                                      right_.data, right_.type, number(right_.ld), right_.stride, beta,
                                      const_cast<void*>(out_.data), out_.type, number(out_.ld), out_.stride,
                                      number(count_), compute_, CUBLAS_GEMM_DEFAULT),
           "cublasGemmStridedBatchedEx");
  }

 private:
  cublasLtHandle_t lt_handle() const { return reinterpret_cast<cublasLtHandle_t>(context_.blas); }
  std::int64_t inner() const { return left_.op == CUBLAS_OP_N ? left_.cols : left_.rows; }

  template <class T, class Create>
  Owned<T> make(const char* call, cublasStatus_t (*destroy)(T), Create create) const {
    T created = nullptr;
    verify(create(&created), call);
    return {created, destroy};
  }
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) const {
    verify(cublasLtMatmulDescSetAttribute(description_.get(), attribute, &value, sizeof value),
           "cublasLtMatmulDescSetAttribute");
  }
  Owned<cublasLtMatrixLayout_t> layout(const BlasOperand& operand, std::int64_t count) const {
    auto result =
        make<cublasLtMatrixLayout_t>("cublasLtMatrixLayoutCreate", cublasLtMatrixLayoutDestroy, [&](auto* to) {
          return cublasLtMatrixLayoutCreate(to, operand.type, static_cast<std::uint64_t>(operand.rows),
                                            static_cast<std::uint64_t>(operand.cols), operand.ld);
        });
    const auto batch = static_cast<std::int32_t>(count);
    const auto stack = [&](cublasLtMatrixLayoutAttribute_t attribute, auto value) {
      verify(cublasLtMatrixLayoutSetAttribute(result.get(), attribute, &value, sizeof value),
             "cublasLtMatrixLayoutSetAttribute");
    };
    if (count > 1) stack(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, batch);
    if (count > 1) stack(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, operand.stride);
    return result;
  }
  void verify(cublasStatus_t status, const char* call) const {
    if (succeeded(status)) return;
    check(status, context_, call, "m", out_.cols, "n", out_.rows, "k", inner(), "ld", out_.ld);
  }

  const Context& context_;
  BlasOperand left_, right_, out_;
  std::int64_t count_;
  cublasComputeType_t compute_;
  bool has_bias_ = false;
  Owned<cublasLtMatmulDesc_t> description_;
  Owned<cublasLtMatrixLayout_t> layouts_[3];
};

// Torch writes into the handle what its user allows. TF32 is two bits: 2 alone is pedantic.
bool allows_tf32(const Context& context) {
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
  check(cublasGetMathMode(context.blas, &mode), context, "cublasGetMathMode");
  return (mode & CUBLAS_TF32_TENSOR_OP_MATH) == CUBLAS_TF32_TENSOR_OP_MATH;
}

// Row-major out = op(a) op(b) is column-major out^T = op(b)^T op(a)^T.
Product product_of(const Context& context, const Matmul& problem) {
  const BlasOperand left = operand(problem.b, problem.op_b);
  const BlasOperand right = operand(problem.a, problem.op_a);
  const bool tf32 = problem.may_use_tf32 && problem.a.format == Format::f32 && allows_tf32(context);
  Product product(context, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F, left, right,
                  operand(problem.out), problem.count);
  if (problem.bias) product.add_bias(problem.bias.data, type_of(problem.bias.format));
  return product;
}

}  // namespace

void matmul(const Context& context, const Matmul& problem) {
  const MutableMatrix& out = problem.out;
  if (out.rows == 0 || out.cols == 0) return;
  float beta = problem.accumulate ? 1.0f : 0.0f;
  const Product product = product_of(context, problem);
  if (product.run(&problem.alpha, &beta)) return;
  if (problem.bias) {
    const Matrix rows{problem.bias.data, out.rows, out.cols, 0, problem.bias.format};  // the same everywhere
    problem.accumulate ? add(context, {out, rows, out}, {}, problem.count)
                       : convert(context, rows, 1.0f, out, problem.count);
    beta = 1.0f;
  }
  product.run_by_handle(&problem.alpha, &beta);
}

bool takes_bias(const Context& context, Matmul problem, const Matrix& bias) {
  if (bias.format != problem.out.format || reinterpret_cast<std::uintptr_t>(bias.data) % 16 != 0) return false;
  problem.bias = bias;
  return product_of(context, problem).algorithm().has_value();
}

void matmul(const Context& context, double alpha, const WideMatrix& a, Op op_a, const WideMatrix& b, Op op_b,
            double beta, const WideMatrix& out, std::int64_t count) {
  const Product product(context, CUBLAS_COMPUTE_64F, CUDA_R_64F, operand(b, op_b), operand(a, op_a), operand(out),
                        count);
  if (!product.run(&alpha, &beta)) product.run_by_handle(&alpha, &beta);
}

void gram(const Context& context, const double* rows, const double* others, std::int64_t k, std::int64_t cols,
          bool first, double* gram, std::int64_t count) {
  const auto factor = [&](const double* data) {
    return WideMatrix{const_cast<double*>(data), k, cols, cols, k * cols};
  };
  matmul(context, 1.0, factor(rows), Op::n, factor(others), Op::t, first ? 0.0 : 1.0, {gram, k, k, k, k * k}, count);
}

}  // namespace pissa::cuda
