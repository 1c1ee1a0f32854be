// Orthogonality in float64: how far rows are from it, orthonormal rows to build matrices from, a one-sided Jacobi SVD.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {

/// Rows [first, first + count).
inline Dense rows_of(const Dense& a, std::int64_t first, std::int64_t count) {
  Dense result(count, a.cols);
  std::copy_n(a.values.begin() + first * a.cols, count * a.cols, result.values.begin());
  return result;
}

inline double dot(const double* a, const double* b, std::int64_t count) {
  return std::inner_product(a, a + count, b, 0.0);
}

/// Largest |<row i, row j> - (i == j)|.
inline double orthonormality_error(const Dense& rows) {
  double worst = 0;
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      const double product = dot(&rows.values[i * rows.cols], &rows.values[j * rows.cols], rows.cols);
      const double error = std::fabs(product - (i == j ? 1 : 0));
      if (!(error <= worst)) worst = error;
      if (std::isnan(worst)) return worst;
    }
  }
  return worst;
}

/// What unit vectors in f32 may miss of orthogonality, their `dim` elements being sums in f32: rounding errors add up
/// like a random walk, sqrt(dim) of them, here with a factor of 8 for the tail of its distribution and the two rounds
/// of a QR.
inline double orthonormality_bound(std::int64_t dim) { return 8 * kEps32 * std::sqrt(static_cast<double>(dim)); }

/// Gram-Schmidt, twice, on rows [done, rows); rows that are in the span of earlier ones are replaced by random ones.
inline void orthonormalize_rows(Dense& rows, std::int64_t done = 0) {
  Random random(99);
  for (std::int64_t i = done; i < rows.rows; ++i) {
    double* row = &rows.values[i * rows.cols];
    for (;;) {
      const double before = std::sqrt(dot(row, row, rows.cols));
      for (int round = 0; round < 2; ++round) {
        for (std::int64_t j = 0; j < i; ++j) {
          const double* earlier = &rows.values[j * rows.cols];
          const double product = dot(row, earlier, rows.cols);
          for (std::int64_t k = 0; k < rows.cols; ++k) row[k] -= product * earlier[k];
        }
      }
      const double length = std::sqrt(dot(row, row, rows.cols));
      if (length > 1e-13 * before) {
        for (std::int64_t k = 0; k < rows.cols; ++k) row[k] /= length;
        break;
      }
      for (std::int64_t k = 0; k < rows.cols; ++k) row[k] = random.normal();
    }
  }
}

inline Dense random_orthonormal(Random& random, std::int64_t count, std::int64_t dim) {
  Dense rows = random.dense(count, dim);
  orthonormalize_rows(rows);
  return rows;
}

/// Singular values below this share of the largest element are rounding errors, without a direction.
inline constexpr double kNoRank = 1e-13;

/// Singular values of a, descending, and its right singular vectors, one per row (zero rows beyond the numerical rank).
struct Svd {
  std::vector<double> s;
  Dense v;
};

/// One-sided Jacobi on the rows of a, which a product of rotations makes orthogonal: G a = S V^T. (Golub, Van
/// Loan, 8.6.3)
inline Svd jacobi_svd(Dense a) {
  if (a.rows > a.cols) {  // of the transpose, and V = A^T U / S
    const Svd turned = jacobi_svd(transposed(a));
    Dense v = turned.v * a;
    for (std::int64_t i = 0; i < v.rows; ++i) {
      const double length = norm(rows_of(v, i, 1));  // the singular value, or 0 beyond the rank
      for (std::int64_t j = 0; j < v.cols && length > 0; ++j) v(i, j) /= length;
    }
    return {turned.s, v};
  }
  double largest = 0;
  for (const double value : a.values) largest = std::max(largest, std::fabs(value));
  if (largest > 0) a = (1 / largest) * a;  // so that no square leaves the range
  for (bool rotated = true; rotated;) {
    rotated = false;
    for (std::int64_t i = 0; i < a.rows; ++i) {
      for (std::int64_t j = i + 1; j < a.rows; ++j) {
        double* x = &a.values[i * a.cols];
        double* y = &a.values[j * a.cols];
        const double xx = dot(x, x, a.cols), yy = dot(y, y, a.cols), xy = dot(x, y, a.cols);
        if (std::fabs(xy) <= 1e-14 * std::sqrt(xx * yy) || std::min(xx, yy) < kNoRank * kNoRank) continue;
        rotated = true;
        const double zeta = (yy - xx) / (2 * xy);
        const double tangent = std::copysign(1, zeta) / (std::fabs(zeta) + std::hypot(1, zeta));
        const double cosine = 1 / std::hypot(1, tangent), sine = cosine * tangent;
        for (std::int64_t k = 0; k < a.cols; ++k) {
          const double x_k = x[k];
          x[k] = cosine * x_k - sine * y[k];
          y[k] = sine * x_k + cosine * y[k];
        }
      }
    }
  }
  std::vector<double> norms(a.rows);
  for (std::int64_t i = 0; i < a.rows; ++i)
    norms[i] = std::sqrt(dot(&a.values[i * a.cols], &a.values[i * a.cols], a.cols));
  std::vector<std::int64_t> order(a.rows);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) { return norms[i] > norms[j]; });
  Svd result{{}, Dense(a.rows, a.cols)};
  for (std::int64_t i = 0; i < a.rows; ++i) {
    const double length = norms[order[i]];
    result.s.push_back(length * largest);
    for (std::int64_t k = 0; k < a.cols; ++k) result.v(i, k) = length < kNoRank ? 0 : a(order[i], k) / length;
  }
  return result;
}

}  // namespace pissa::test
