// Scores of a language model's output layer for the next tokens: log-probabilities, without logits in memory.
//
//   logits  l = x W^T + bias        z = scale l, or cap tanh(scale l / cap)
//   scores  log p_y = z_y - log sum exp(z), and the other scores of a row of z
//   dx      d log p_y / dx = ((e_y - p) dz/dl) W, for each token by itself
//
// A loss that weights tokens, such as cross-entropy or a preference loss, is a sum of log p_y. Its gradient is dx, each
// row times its token's weight. Therefore logits are computed once, for a chunk of tokens at a time, and discarded.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pissa/core/backend.h"
#include "pissa/core/error.h"
#include "pissa/core/types.h"

namespace pissa {

/// Computes the scores of the tokens, and their gradients if `dx` is given.
///
/// @param x [tokens, in], dense
/// @param weight [vocabulary, in], any format
/// @param bias [1, vocabulary], dense; may be absent
/// @param labels [tokens], in the backend's memory; for one outside the vocabulary, scores and dx are NaN
/// @param scale factor of the logits
/// @param cap the bound of soft-capping; 0: none
/// @param scores [tokens, kScores] f32, is written
/// @param dx [tokens, in], dense, is written; may be absent
template <Backend B>
void token_scores(B& backend, const Matrix& x, const Matrix& weight, const Matrix& bias, const std::int64_t* labels,
                  float scale, float cap, const MutableMatrix& scores, const MutableMatrix& dx) {
  PISSA_CHECK(scores.cols == kScores && scores.rows == x.rows, "scores: needed one row of ", kScores, " for each of ",
              x.rows, " tokens");
  if (x.rows == 0) return;
  const Precision precision = precision_of(x.format);
  const std::int64_t most = std::max<std::int64_t>(B::kLogitBytes / (4 * std::max<std::int64_t>(weight.rows, 1)), 1);
  const std::int64_t step = ceil_div(x.rows, ceil_div(x.rows, most));
  const auto decoded = backend.decode_ahead(weight, Op::n, precision, step);
  auto logits = backend.alloc(step, weight.rows, Format::f32);
  for (std::int64_t first = 0; first < x.rows; first += step) {
    const std::int64_t count = std::min(step, x.rows - first);
    const MutableMatrix part = rows_of(logits.view(), 0, count);
    backend.weight_gemm_nt(rows_of(x, first, count), decoded, 1.0f, precision, {}, bias, part);
    backend.score_rows(part, labels + first, scale, cap, rows_of(scores, first, count), static_cast<bool>(dx));
    if (dx) backend.weight_gemm_nn(part, decoded, 1.0f, precision, {}, rows_of(dx, first, count));
  }
}

}  // namespace pissa
