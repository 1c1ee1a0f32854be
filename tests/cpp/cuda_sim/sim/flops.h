// Floating-point operations of what the libraries compute, as textbooks count them (LAPACK working note 41).
#pragma once

namespace cuda_sim::detail {

constexpr double gemm_flops(double m, double n, double k) { return 2 * m * n * k; }

/// Of a Cholesky factor.
constexpr double potrf_flops(double n) { return n * n * n / 3; }

/// A triangular matrix of `size`, solved for `vectors` right-hand sides.
constexpr double trsm_flops(double size, double vectors) { return size * size * vectors; }

/// Householder's QR of an m x n matrix, m >= n; or its n reflectors multiplied out.
constexpr double geqrf_flops(double m, double n) { return 2 * n * n * (m - n / 3); }

}  // namespace cuda_sim::detail
