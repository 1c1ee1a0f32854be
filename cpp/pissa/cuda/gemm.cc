#include "pissa/cuda/gemm.h"

#include <algorithm>
#include <cstdint>

#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/factorize.h"
#include "pissa/cuda/lt_plan.h"
#include "pissa/cuda/routes.h"

namespace pissa::cuda {
namespace {

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

// By cublasLt, or where it knows no way, at any alignment, by the handle; false: the latter would leave out the bias.
bool run(const Context& context, const BlasProblem& problem, const void* alpha, const void* beta) {
  if (is_open(context.device, Route::lt) && LtPlan::of(context, problem).run(context, problem, alpha, beta))
    return true;
  if (problem.bias) return false;
  const PreciseMath precise(context);
  const auto number = [](std::int64_t n) { return static_cast<int>(n); };
  const auto& [compute, left, right, out, count, bias, bias_type] = problem;
  check(cublasGemmStridedBatchedEx(context.blas, left.op, right.op, number(out.rows), number(out.cols),
                                   number(problem.inner()), alpha, left.data, left.type, number(left.ld), left.stride,
                                   right.data, right.type, number(right.ld), right.stride, beta,
                                   const_cast<void*>(out.data), out.type, number(out.ld), out.stride, number(count),
                                   compute, CUBLAS_GEMM_DEFAULT),
        context, problem, "cublasGemmStridedBatchedEx");
  return true;
}

// Torch writes into the handle what its user allows. TF32 is two bits: 2 alone is pedantic.
bool allows_tf32(const Context& context) {
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
  check(cublasGetMathMode(context.blas, &mode), context, "cublasGetMathMode");
  return (mode & CUBLAS_TF32_TENSOR_OP_MATH) == CUBLAS_TF32_TENSOR_OP_MATH;
}

// Row-major out = op(a) op(b) is column-major out^T = op(b)^T op(a)^T.
BlasProblem problem_of(const Context& context, const Matmul& product) {
  const bool tf32 = product.may_use_tf32 && product.a.format == Format::f32 && allows_tf32(context);
  return {tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
          operand(product.b, product.op_b),
          operand(product.a, product.op_a),
          operand(product.out),
          product.count,
          product.bias.data,
          product.bias ? type_of(product.bias.format) : CUDA_R_32F};
}

}  // namespace

void matmul(const Context& context, const Matmul& product) {
  const MutableMatrix& out = product.out;
  if (out.rows == 0 || out.cols == 0) return;
  float beta = product.accumulate ? 1.0f : 0.0f;
  BlasProblem problem = problem_of(context, product);
  if (run(context, problem, &product.alpha, &beta)) return;
  const Matrix rows{product.bias.data, out.rows, out.cols, 0, product.bias.format};  // the same everywhere
  product.accumulate ? add(context, {out, rows, out}, {}, product.count)
                     : convert(context, rows, 1.0f, out, product.count);
  beta = 1.0f;
  problem.bias = nullptr;
  run(context, problem, &product.alpha, &beta);
}

bool takes_bias(const Context& context, Matmul product, const Matrix& bias) {
  if (bias.format != product.out.format || reinterpret_cast<std::uintptr_t>(bias.data) % 16 != 0) return false;
  product.bias = bias;
  return is_open(context.device, Route::lt) && static_cast<bool>(LtPlan::of(context, problem_of(context, product)));
}

void matmul(const Context& context, double alpha, const WideMatrix& a, Op op_a, const WideMatrix& b, Op op_b,
            double beta, const WideMatrix& out, std::int64_t count) {
  run(context, {CUBLAS_COMPUTE_64F, operand(b, op_b), operand(a, op_a), operand(out), count}, &alpha, &beta);
}

void gram(const Context& context, const double* rows, const double* others, std::int64_t k, std::int64_t cols,
          bool first, double* gram, std::int64_t count) {
  // Rows are computed up to the diagonal, because many cards compute f64 at 1/64 of the rate of f32: the 490 rows of a
  // start of rank 64 take 0.63 of the products.
  constexpr std::int64_t kRows = 128;
  for (std::int64_t from = 0; from < k; from += kRows) {
    const std::int64_t end = std::min(from + kRows, k);
    const auto factor = [&](const double* data, std::int64_t first_row, std::int64_t end_row) {
      return WideMatrix{const_cast<double*>(data) + first_row * cols, end_row - first_row, cols, cols, k * cols};
    };
    matmul(context, 1.0, factor(rows, from, end), Op::n, factor(others, 0, end), Op::t, first ? 0.0 : 1.0,
           {gram + from * k, end - from, end, k, k * k}, count);
  }
  if (k > kRows) mirror_lower(context, gram, k, count);
}

}  // namespace pissa::cuda
