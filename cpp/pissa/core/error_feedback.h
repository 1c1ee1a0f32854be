// Codes by error feedback (GPTQ, arXiv 2210.17323; as LDLQ, arXiv 2307.13304, section 4), with a format's own levels
// and given scales: the codes of a weight W [out, in] that lose least of the outputs x W^T for inputs x with the second
// moment R = E[x^T x].
//
// With R = L L^T, the loss tr(D R D^T) of D = W - Q is the sum of the squares of D L. Column j of D L is D[:, j] L[j,
// j] + the sum over k > j of D[:, k] L[k, j]. Therefore the columns are rounded from the last to the first, each to the
// levels nearest to the values that make its own column of D L zero:
//
//   Q[:, j] = nearest(W[:, j] + sum over k > j of D[:, k] L[k, j] / L[j, j])
//
// For a group of columns, the sums over the columns after the group are a GEMM; those within it go column by column.
#pragma once

#include <array>
#include <cstdint>
#include <numeric>

#include "pissa/core/backend.h"
#include "pissa/core/error.h"
#include "pissa/core/types.h"

namespace pissa {

/// Writes the codes of a weight by error feedback.
///
/// @param backend computes
/// @param w [out, in], dense, finite
/// @param lower [in, in] f32, a Cholesky factor of the second moment, made positive definite: R = L L^T; elements above
///     its diagonal are not read
/// @param format a quantised one, in which a row ends with a whole byte
/// @param scales the scales of the codes, as they are stored
/// @param codes code_bytes(format, out * in) bytes, are written
/// @throws std::invalid_argument shapes or formats that do not fit together
template <Backend B>
void quantize_with_feedback(B& backend, const Matrix& w, const Matrix& lower, Format format, const Scales& scales,
                            std::uint8_t* codes) {
  PISSA_CHECK(!is_quantized(w.format), "weight: got ", info(w.format).name, "; needed: f32, bf16 or f16");
  PISSA_CHECK(lower.format == Format::f32 && lower.rows == w.cols && lower.cols == w.cols, "lower: got [", lower.rows,
              ", ", lower.cols, "] in ", info(lower.format).name, "; needed: [", w.cols, ", ", w.cols, "] in f32");
  PISSA_CHECK(w.cols * info(format).bits % 8 == 0, "weight: got ", w.cols, " columns; needed by error feedback in ",
              info(format).name, ": a multiple of ", 8 / std::gcd(8, info(format).bits));
  const auto errors = backend.alloc(w.rows, w.cols, Format::f32);
  std::int64_t last = w.cols;
  while (last > 0) {
    const std::int64_t first = (last - 1) / kFeedbackColumns * kFeedbackColumns;
    const MutableMatrix group = cols_of(errors.view(), first, last - first);
    const std::array sums{Term{cols_of(errors.view(), last, w.cols - last), Op::n,
                               cols_of(rows_of(lower, last, w.cols - last), first, last - first)}};
    backend.gemm(sums, {}, group);
    backend.quantize_columns(w, lower, format, scales, first, group, codes);
    last = first;
  }
}

}  // namespace pissa
