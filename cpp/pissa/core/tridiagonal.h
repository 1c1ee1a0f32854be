// The eigenproblem of a symmetric tridiagonal matrix, one eigenpair at a time. A backend runs many side by side.
//
// Sequential functions for one thread. The vectors that they write may be interleaved with those of their neighbours.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

/// A symmetric tridiagonal matrix [n, n], n >= 1: its diagonal [n] and its subdiagonal [n - 1].
struct Tridiagonal {
  const double* diagonal;
  const double* subdiagonal;
  std::int64_t n;
};

/// A vector, `stride` elements from one number to the next.
struct StridedVector {
  double* data;
  std::int64_t stride = 1;

  PISSA_INLINE constexpr double& operator[](std::int64_t i) const { return data[i * stride]; }
};

/// The number of eigenvalues less than x, which is the number of negative pivots of T - x (Sylvester; Golub, Van Loan,
/// 8.4.1). A pivot smaller than `tiny` becomes -tiny; a squared subdiagonal, divided by it, must be finite.
PISSA_INLINE constexpr std::int64_t eigenvalues_below(const Tridiagonal& t, double x, double tiny) {
  std::int64_t count = 0;
  double pivot = 1.0;
  double below = 0.0;  // of row i, left of the diagonal
  for (std::int64_t i = 0; i < t.n; ++i) {
    pivot = t.diagonal[i] - x - below * below / pivot;
    if (pivot < tiny && pivot > -tiny) pivot = -tiny;
    if (pivot < 0.0) ++count;
    if (i + 1 < t.n) below = t.subdiagonal[i];
  }
  return count;
}

/// One step of inverse iteration, x = (T - shift)^-1 x, by Gaussian elimination with partial pivoting (LAPACK's gttrf
/// and gttrs in one). A pivot smaller than `tiny` becomes `tiny`. `pivot`, `first`, `second` [n]: memory for the
/// diagonal and both superdiagonals of U.
PISSA_INLINE constexpr void solve_tridiagonal(const Tridiagonal& t, double shift, double tiny, const StridedVector& x,
                                              const StridedVector& pivot, const StridedVector& first,
                                              const StridedVector& second) {
  struct Row {
    double pivot, first, second, x;
  };
  const auto is_tiny = [tiny](double value) { return value < tiny && value > -tiny; };
  const auto magnitude = [](double value) { return value < 0.0 ? -value : value; };
  const auto next = [&](std::int64_t i) { return i + 1 < t.n ? t.subdiagonal[i] : 0.0; };
  const auto keep = [&](std::int64_t i, Row& row) {
    if (is_tiny(row.pivot)) row.pivot = tiny;
    pivot[i] = row.pivot, first[i] = row.first, second[i] = row.second, x[i] = row.x;
  };
  Row row{t.diagonal[0] - shift, next(0), 0.0, x[0]};
  for (std::int64_t i = 0; i + 1 < t.n; ++i) {
    Row other{t.diagonal[i + 1] - shift, next(i + 1), 0.0, x[i + 1]};  // below row i, from column i + 1
    double below = t.subdiagonal[i];
    if (magnitude(below) > magnitude(row.pivot)) {  // exchange the rows
      const Row above = row;
      row = {below, other.pivot, other.first, other.x};
      below = above.pivot;
      other = {above.first, above.second, 0.0, above.x};
    }
    keep(i, row);
    const double factor = below / row.pivot;
    row = {other.pivot - factor * row.first, other.first - factor * row.second, 0.0, other.x - factor * row.x};
  }
  keep(t.n - 1, row);
  double after = 0.0, second_after = 0.0;  // x[i + 1], x[i + 2]
  for (std::int64_t i = t.n - 1; i >= 0; --i) {
    const double value = (x[i] - first[i] * after - second[i] * second_after) / pivot[i];
    second_after = after;
    after = x[i] = value;
  }
}

}  // namespace pissa
