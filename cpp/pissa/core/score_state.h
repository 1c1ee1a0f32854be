// A token's sums over its logits, from which its scores and the shares of its gradient follow; token_scores.h says what
// for.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

/// The scores of a token: log p of its label, the entropy, log of the sum of p squared, the mean of the logits, and 1
/// if none is larger than the label's, otherwise 0.
inline constexpr std::int64_t kScores = 5;

/// Sums over the logits z that were read so far: the largest, m; the sums of e = exp(z - m), of e^2 and of e (z - m),
/// all without the label's; the sum of z; and the label's z, NaN until it is read.
struct ScoreState {
  float largest = -0x1.fffffep127f;
  float total = 0, squares = 0, weighted = 0;
  float sum = 0;
  float of_label = __builtin_nanf("");

  /// Adds the sums over other logits, whose m is at least this one. Returns the factor of what was summed before.
  template <class Exp>
  PISSA_INLINE constexpr float add(const ScoreState& other, Exp exp) {
    const float grown = largest - other.largest < -87.0f ? -87.0f : largest - other.largest;
    const float factor = other.largest > largest ? exp(grown) : 1.0f;
    weighted = factor * (weighted + grown * total) + other.weighted;
    total = factor * total + other.total;
    squares = factor * factor * squares + other.squares;
    sum += other.sum;
    largest = other.largest;
    return factor;
  }
};

/// The floats of a ScoreState.
inline constexpr std::int64_t kScoreState = sizeof(ScoreState) / sizeof(float);

/// d log p_y / dx = label * (the label's row of W) + others * (the sum over the other rows of exp(z - m) dz/dl).
struct ScoreShares {
  float label, others;
};

/// Writes the scores of a token after all logits.
///
/// @param known whether its label is one of the vocabulary
/// @param e exp(of_label - largest)
/// @param log the natural logarithm, in f64
template <class Log>
PISSA_INLINE constexpr ScoreShares finish_scores(const ScoreState& state, bool known, double e, std::int64_t vocabulary,
                                                 float scale, float cap, Log log, float* scores) {
  const double z = double{state.of_label} - double{state.largest};
  const double own = known ? e : 0.0;
  const double total = double{state.total} + own;
  const double log_total = log(total);
  scores[0] = static_cast<float>(z - log_total);
  scores[1] = static_cast<float>(log_total - (double{state.weighted} + (own > 0 ? own * z : own)) / total);
  scores[2] = static_cast<float>(log(double{state.squares} + own * own) - 2 * log_total);
  scores[3] = static_cast<float>(double{state.sum} / static_cast<double>(vocabulary));
  scores[4] = state.of_label >= state.largest ? 1.0f : 0.0f;
  const double of_cap = cap > 0 ? double{state.of_label} / double{cap} : 0.0;
  const double share = known ? double{scale} / total : z;  // NaN
  return {static_cast<float>(share * double{state.total} * (1 - of_cap * of_cap)), static_cast<float>(-share)};
}

}  // namespace pissa
