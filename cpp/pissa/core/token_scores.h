// Scores of a language model's output layer for the next tokens: log-probabilities, without logits in memory.
//
//   logits  l = x W^T + bias        z = scale l, or cap tanh(scale l / cap)
//   scores  log p_y = z_y - log sum exp(z), and the other scores of a row of z
//   dx      d log p_y / dx = ((e_y - p) dz/dl) W, for each token by itself
//
// A loss that weights tokens, such as cross-entropy or a preference loss, is a sum of log p_y. Its gradient is dx, each
// row times its token's weight.
//
// The vocabulary is read once, in parts, as attention reads keys and values (FlashAttention, arXiv 2205.14135, with
// K = V = W). A part's logits become exp(z - m), where m is the largest z so far, and are multiplied with the same rows
// of W. When m grows, what is summed so far is scaled down. The label's logit is left out of these sums and added at
// the end, because 1 - p_y computed from a rounded p_y would have few digits for a token that the model is sure of.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "pissa/core/backend.h"
#include "pissa/core/error.h"
#include "pissa/core/quantized.h"
#include "pissa/core/types.h"

namespace pissa {

/// Computes the scores of the tokens, and their gradients if `dx` is given.
///
/// @param x [tokens, in], dense
/// @param weight [vocabulary, in], any format
/// @param bias [1, vocabulary], dense; may be absent
/// @param labels [tokens], in the backend's memory; for one outside the vocabulary, log p and dx are NaN
/// @param scale factor of the logits
/// @param cap the bound of soft-capping; 0: none
/// @param scores [tokens, kScores] f32, is written
/// @param dx [tokens, in], dense, is written; may be absent
/// @param logit_bytes of the logits of a part, which has 256 rows of the vocabulary at least
template <Backend B>
void token_scores(B& backend, const Matrix& x, const Matrix& weight, const Matrix& bias, const std::int64_t* labels,
                  float scale, float cap, const MutableMatrix& scores, const MutableMatrix& dx,
                  std::int64_t logit_bytes = B::kLogitBytes) {
  PISSA_CHECK(scores.cols == kScores && scores.rows == x.rows, "scores: needed one row of ", kScores, " for each of ",
              x.rows, " tokens");
  PISSA_CHECK(weight.rows > 0, "weight: got no rows; needed: at least 1");
  if (x.rows == 0) return;
  const Precision precision = precision_of(x.format);
  const std::int64_t tokens = ceil_div(x.rows, ceil_div(x.rows, B::kScoredTokens));
  const std::int64_t least = std::lcm(separable_rows(weight), 256);
  const std::int64_t part =
      std::min(std::max(logit_bytes / (4 * tokens) / least, std::int64_t{1}) * least, weight.rows);
  const bool needs_sum = dx && dx.format != Format::f32;
  auto logits = backend.alloc(tokens, part, Format::f32);
  auto state = backend.alloc(tokens, kScoreState, Format::f32);
  auto buffer = backend.alloc(needs_sum ? tokens : 0, x.cols, Format::f32);
  for (std::int64_t first = 0; first < x.rows; first += tokens) {
    const std::int64_t count = std::min(tokens, x.rows - first);
    const Matrix x_rows = rows_of(x, first, count);
    const MutableMatrix sums = rows_of(state.view(), 0, count);
    const MutableMatrix dx_rows = dx ? rows_of(dx, first, count) : MutableMatrix{};
    const MutableMatrix dx_sum = needs_sum ? rows_of(buffer.view(), 0, count) : dx_rows;
    for (std::int64_t row = 0; row < weight.rows; row += part) {
      const Matrix rows = separate_rows(weight, row, std::min(part, weight.rows - row));
      const MutableMatrix z = cols_of(rows_of(logits.view(), 0, count), 0, rows.rows);
      backend.weight_gemm_nt(x_rows, rows, 1.0f, precision, {}, bias ? cols_of(bias, row, rows.rows) : Matrix{}, z);
      const MutableMatrix earlier = row > 0 ? dx_sum : MutableMatrix{};
      backend.add_scores(z, labels + first, row, scale, cap, sums, earlier, static_cast<bool>(dx));
      const std::array product{Term{z, Op::n, rows, Op::n, 1.0f, precision}};
      if (dx) backend.gemm(product, earlier, dx_sum);
    }
    backend.finish_scores(sums, labels + first, weight, scale, cap, rows_of(scores, first, count), dx_sum, dx_rows);
  }
}

}  // namespace pissa
