// When CholeskyQR is accurate enough, for every backend's `orthonormalize`.
#pragma once

namespace pissa {

/// The pivots that a round of block Gram-Schmidt and Cholesky QR requires. Otherwise, the rows go to Householder.
struct CholeskyRound {
  double least_ratio;  ///< of a pivot to the largest one (the CPU), or to the length of its row (CUDA)
  double least_pivot;
};

/// With the Gram matrix in f64, one round brings the rows within condition * eps of orthonormal, and a second one
/// within a few eps (Yamamoto et al., CholeskyQR2, 2015). Rows are too dependent for the first round if f32 rounding
/// would leave them worse than 1e-2 after it, or if they are shorter than 1e-30, with a weight's elements around 1: the
/// inverse of such a length may exceed f32. In the second round rows have length 1, and those that it shortens by half
/// are rounding errors inside the span of the earlier rows.
inline constexpr CholeskyRound kCholeskyRounds[] = {{1e-5, 1e-30}, {0.5, 0.5}};

}  // namespace pissa
