// When CholeskyQR is good enough, for every backend's `orthonormalize`.
#pragma once

namespace pissa {

/// What a round of block Gram-Schmidt and Cholesky QR asks of its pivots; else the rows go to Householder.
struct CholeskyRound {
  double least_ratio;  ///< of a pivot to the largest one (the CPU), or to the length of its row (CUDA)
  double least_pivot;
};

/// With the Gram matrix in f64, one round brings the rows within condition * eps of orthonormal, a second one within a
/// few eps (Yamamoto et al., CholeskyQR2, 2015). Rows too dependent for the first round are those that f32 rounding
/// would leave worse than 1e-2 after it, and those shorter than 1e-30, where a weight's elements are around 1: the
/// inverse of such a length may be more than f32 holds. In the second round rows have length 1; those that it shortens
/// by half are rounding errors inside the span of the earlier.
inline constexpr CholeskyRound kCholeskyRounds[] = {{1e-5, 1e-30}, {0.5, 0.5}};

}  // namespace pissa
