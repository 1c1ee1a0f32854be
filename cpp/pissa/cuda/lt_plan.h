// How cublasLt computes a product: its descriptions and its algorithm, found once for each shape that a thread meets.
// Finding them takes some ten calls and the heuristic, microseconds of the host for each product of a layer.
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>

#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// An operand as BLAS sees it: column-major, so a row-major matrix is its own transpose.
struct BlasOperand {
  const void* data;
  cudaDataType_t type;
  std::int64_t rows, cols, ld, stride;
  cublasOperation_t op = CUBLAS_OP_N;
};

/// out = alpha left right + beta out + bias, column-major, for `count` matrices.
struct BlasProblem {
  cublasComputeType_t compute;
  BlasOperand left, right, out;
  std::int64_t count;
  const void* bias = nullptr;  ///< [out.rows], one element for each row; absent: none
  cudaDataType_t bias_type = CUDA_R_32F;

  std::int64_t inner() const { return left.op == CUBLAS_OP_N ? left.cols : left.rows; }
};

/// Throws like cuda::check, with the problem's sizes.
void check(cublasStatus_t status, const Context& context, const BlasProblem& problem, const char* call);

class LtPlan {
 public:
  /// The calling thread's plan for problems that differ from this one at most in their data's places, of which the
  /// alignments are equal. It is valid until the next call.
  static const LtPlan& of(const Context& context, const BlasProblem& problem);
  /// Drops the calling thread's plans: for a library that computes otherwise from now on.
  static void forget(const Context& context);

  /// Whether cublasLt knows an algorithm. It may know none for operands that are not at 16 bytes.
  explicit operator bool() const { return best_.has_value(); }

  /// False, and nothing is computed, where cublasLt knows no algorithm. For operands at 2 bytes next to others at more
  /// it may say so only here.
  bool run(const Context& context, const BlasProblem& problem, const void* alpha, const void* beta) const;

 private:
  template <class T>
  using Owned = std::unique_ptr<std::remove_pointer_t<T>, cublasStatus_t (*)(T)>;

  LtPlan(const Context& context, const BlasProblem& problem);

  Owned<cublasLtMatmulDesc_t> description_;
  std::array<Owned<cublasLtMatrixLayout_t>, 3> layouts_;
  std::optional<cublasLtMatmulHeuristicResult_t> best_;
};

}  // namespace pissa::cuda
