// Tridiagonal systems and eigenvalue counts, against what defines them.
#include "pissa/core/tridiagonal.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

struct Case {
  std::vector<double> diagonal, subdiagonal;

  std::int64_t size() const { return static_cast<std::int64_t>(diagonal.size()); }
  Tridiagonal view() const { return {diagonal.data(), subdiagonal.data(), size()}; }
  Dense dense() const {
    Dense result(size(), size());
    for (std::int64_t i = 0; i < size(); ++i) {
      result(i, i) = diagonal[i];
      if (i > 0) result(i, i - 1) = result(i - 1, i) = subdiagonal[i - 1];
    }
    return result;
  }
};

Case random_case(Random& random, std::int64_t n) {
  return {random.dense(1, n).values, random.dense(1, std::max<std::int64_t>(n - 1, 1)).values};
}

// The backward error of elimination with partial pivoting, whose multipliers are at most 1: T - shift has errors of a
// few roundings of its largest elements, in each of three diagonals. Without exchanges an element grows by the inverse
// of the pivot: 1e12 here.
TEST(TridiagonalTest, SolvesWhateverThePivots) {
  Random random(1);
  for (std::int64_t n = 1; n <= 40; ++n) {
    for (const double distance : {1.0, 1e-12}) {
      for (const std::int64_t stride : {1, 3}) {
        const Case t = random_case(random, n);
        const double shift = t.diagonal[0] - distance;
        const Dense b = random.dense(n, 1);
        Dense x(n, stride), pivot(n, stride), first(n, stride), second(n, stride), solution(n, 1);
        for (std::int64_t i = 0; i < n; ++i) x(i, 0) = b(i, 0);
        solve_tridiagonal(t.view(), shift, 1e-300, {x.values.data(), stride}, {pivot.values.data(), stride},
                          {first.values.data(), stride}, {second.values.data(), stride});
        for (std::int64_t i = 0; i < n; ++i) solution(i, 0) = x(i, 0);
        Dense shifted = t.dense();
        for (std::int64_t i = 0; i < n; ++i) shifted(i, i) -= shift;
        EXPECT_LE(norm(shifted * solution - b), 32 * kEps64 * norm(shifted) * norm(solution))
            << n << ", pivot " << distance << ", stride " << stride;
      }
    }
  }
}

// A singular matrix has the solution of one that differs by `tiny`: large, finite, along its kernel.
TEST(TridiagonalTest, SolvesSingularSystems) {
  const Case t{{1.0, 2.0, 1.0}, {1.0, 1.0}};  // (1, -1, 1) T = 0
  std::vector<double> x{0.3, -0.2, 0.9}, room(9);
  solve_tridiagonal(t.view(), 0.0, 1e-16, {x.data()}, {&room[0]}, {&room[3]}, {&room[6]});
  EXPECT_GT(std::fabs(x[0]), 1e15);
  EXPECT_TRUE(std::isfinite(x[0]));
  EXPECT_NEAR(x[1] / x[0], -1.0, 1e-15);
  EXPECT_NEAR(x[2] / x[0], 1.0, 1e-15);
}

TEST(TridiagonalTest, CountsEigenvaluesBelow) {
  Random random(2);
  for (std::int64_t n = 1; n <= 30; ++n) {
    Case t = random_case(random, n);
    if (n % 3 == 0) t.subdiagonal[n / 3] = 0;
    // Singular values of T + c are its eigenvalues if none is negative.
    const double c = 10;
    for (double& value : t.diagonal) value += c;
    std::vector<double> values = jacobi_svd(t.dense()).s;
    std::reverse(values.begin(), values.end());
    EXPECT_EQ(eigenvalues_below(t.view(), 0.0, 1e-300), 0);
    EXPECT_EQ(eigenvalues_below(t.view(), 3 * c, 1e-300), n);
    for (std::int64_t i = 0; i < n; ++i) {
      EXPECT_EQ(eigenvalues_below(t.view(), values[i] - 1e-12, 1e-300), i);
      EXPECT_EQ(eigenvalues_below(t.view(), values[i] + 1e-12, 1e-300), i + 1);
    }
  }
}

// Pivots that vanish: x is an eigenvalue of a leading block.
TEST(TridiagonalTest, CountsWhereAPivotVanishes) {
  const Case t{{2.0, 2.0, 2.0, 2.0}, {1.0, 1.0, 1.0}};  // 2 + 2 cos(i pi / 5)
  EXPECT_EQ(eigenvalues_below(t.view(), 2.0, 0x1p-400), 2);
  const Case multiple{{2.0, 2.0, 2.0}, {0.0, 0.0}};
  EXPECT_EQ(eigenvalues_below(multiple.view(), std::nextafter(2.0, 0.0), 0x1p-400), 0);
  EXPECT_EQ(eigenvalues_below(multiple.view(), std::nextafter(2.0, 3.0), 0x1p-400), 3);
}

}  // namespace
}  // namespace pissa::test
