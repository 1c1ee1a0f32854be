// The first operand of a product of integers of 8 bits (Precision::int8), rounded, and the columns that are not.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// What a product a op(b) is computed from. The elements of a run share a scale, so that a column of a that is much
/// larger than the others leaves few digits of them. Such columns of x are multiplied in a term of their own, in the
/// precision of the activations, and are 0 in bytes (as in LLM.int8(), arXiv 2208.07339, which chooses by a fixed
/// magnitude). Gradients have none.
class ByteProduct {
 public:
  /// Rounds product.a, times its scale.
  ByteProduct(const Kernels& kernels, const Executor& executor, const Term& product);

  const ByteRows& rows() const { return rows_; }
  /// The product of the columns apart: one term, or none.
  std::span<const Term> apart() const { return std::span(&apart_, columns_.empty() ? 0 : 1); }

 private:
  std::vector<std::int64_t> columns_;
  Buffer bytes_, scales_, starts_, x_, weight_;
  ByteRows rows_;
  Term apart_;
};

}  // namespace pissa::cpu
