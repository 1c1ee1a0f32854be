// Floating-point operations of what the libraries compute, as textbooks count them (LAPACK working note 41).
#pragma once

#include <algorithm>

namespace cuda_sim::detail {

constexpr double gemm_flops(double m, double n, double k) { return 2 * m * n * k; }

/// Of a Cholesky factor.
constexpr double potrf_flops(double n) { return n * n * n / 3; }

/// A triangular matrix of `size`, solved for `vectors` right-hand sides.
constexpr double trsm_flops(double size, double vectors) { return size * size * vectors; }

/// Householder's QR of an m x n matrix.
constexpr double geqrf_flops(double m, double n) {
  const double k = std::min(m, n);
  return 2 * k * k * (std::max(m, n) - k / 3);
}

/// The first n columns of the product of k reflectors of length m.
constexpr double orgqr_flops(double m, double n, double k) {
  return 4 * m * n * k - 2 * (m + n) * k * k + 4 * k * k * k / 3;
}

}  // namespace cuda_sim::detail
