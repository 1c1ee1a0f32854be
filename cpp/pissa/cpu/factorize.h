// Small dense factorisations in f64, with Eigen: Cholesky, Householder QR, the symmetric eigenproblem.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace pissa::cpu {

/// inverse = L^-1 (f32, row-major [k, k], zero above the diagonal) with gram = L L^T; gram's lower triangle is read.
/// Returns diag(L), or nothing, leaving `inverse` unspecified, if gram is not safely positive definite: a Cholesky
/// pivot is not positive, or the smallest element of diag(L) is not above `least_pivot` and `least_ratio` times the
/// largest.
std::optional<std::vector<double>> cholesky_inverse(const double* gram, std::int64_t k, double least_ratio,
                                                    double least_pivot, float* inverse);

/// Replaces rows [done, rows) of a row-major matrix so that all rows are orthonormal, given that the first `done` are.
/// Rank-deficient rows are completed. This is a QR of the transpose, with the diagonal of R made positive.
void householder_rows(float* data, std::int64_t done, std::int64_t rows, std::int64_t cols, std::int64_t ld);

/// Leading eigenvalues of the symmetric gram [k, k] (lower triangle), descending, clamped at 0, and their eigenvectors
/// as rows of `vectors` [values.size(), k], leading dimension ld. Throws std::runtime_error if they do not converge.
void eigh(const double* gram, std::int64_t k, std::span<double> values, float* vectors, std::int64_t ld);

}  // namespace pissa::cpu
