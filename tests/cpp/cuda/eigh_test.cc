// cuda::leading_eigh: the leading eigenpairs of Gram matrices, whatever their spectrum.
#include "pissa/cuda/eigh.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "pissa/cuda/factorize.h"
#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

/// What leading_eigh says of a stack: s [count, r], the vectors of one matrix below those of the one before, flags.
struct Pairs {
  Stored s, vectors;
  std::vector<int> flags;

  Dense vectors_of(std::int64_t matrix) const {
    return rows_of(vectors.values(), matrix * s.view().cols, s.view().cols);
  }
};

Pairs leading_eigh(const std::vector<Dense>& grams, std::int64_t r, float scale, int flags = 0) {
  const cuda::Context& context = cuda::standalone_context();
  const std::int64_t count = static_cast<std::int64_t>(grams.size()), k = grams[0].rows;
  std::vector<double> values;
  for (const Dense& gram : grams) values.insert(values.end(), gram.values.begin(), gram.values.end());
  Pairs result{Stored::poisoned(count, r, Format::f32), Stored::poisoned(count * r, k, Format::f32),
               std::vector<int>(grams.size(), flags)};
  Staging at(context);
  MutableMatrix s = at(result.s.mutable_view()), vectors = at(result.vectors.mutable_view());
  s.rows = 1, s.stride = s.ld;
  vectors.rows = r, vectors.stride = r * vectors.ld;
  cuda::leading_eigh(context, at.upload(values.data(), count * k * k), k, scale, s, vectors,
                     at.upload(result.flags.data(), count, true), count);
  at.finish();
  EXPECT_TRUE(result.s.padding_intact() && result.vectors.padding_intact());
  return result;
}

using Spectrum = std::vector<double>;  // descending

/// Q^T diag(spectrum) Q, for a random Q.
Dense with_eigenvalues(Random& random, const Spectrum& spectrum) {
  const std::int64_t k = static_cast<std::int64_t>(spectrum.size());
  const Dense q = random_orthonormal(random, k, k);
  Dense scaled = q;
  for (std::int64_t i = 0; i < k * k; ++i) scaled.values[i] *= spectrum[i / k];
  return transposed(q) * scaled;
}

Dense diagonal(const Spectrum& values) {
  const std::int64_t k = static_cast<std::int64_t>(values.size());
  Dense result(k, k);
  for (std::int64_t i = 0; i < k; ++i) result(i, i) = values[i];
  return result;
}

/// The spectrum f(0), f(1), ...
Spectrum spectrum_of(std::int64_t k, const std::function<double(std::int64_t)>& f) {
  Spectrum result;
  for (std::int64_t i = 0; i < k; ++i) result.push_back(f(i));
  return result;
}

class EighTest : public BackendTest {
 protected:
  /// Eigenvalues of f64, but for the rounding of s to f32: the reduction, bisection and the matrix itself, where it was
  /// made from its spectrum, err by a few k eps64 |G|. Vectors of f32: each misses by eps32, so that they are
  /// orthogonal but for two, and G v - lambda v is 0 but for one of |G|, and for two of lambda in s^2.
  void check(const std::string& what, const Dense& gram, const Spectrum& exact, std::int64_t r) const {
    SCOPED_TRACE(::testing::Message() << what << ", k = " << gram.rows << ", " << r << " wanted");
    const Pairs pairs = leading_eigh({gram}, r, 0.5f);
    ASSERT_EQ(pairs.flags[0], 0);
    expect_pairs(pairs, 0, gram, exact, 0.5);
  }

  static void expect_pairs(const Pairs& pairs, std::int64_t matrix, const Dense& gram, const Spectrum& exact,
                           double scale) {
    const Dense s = pairs.s.values(), vectors = pairs.vectors_of(matrix);
    const std::int64_t r = s.cols, k = gram.rows;
    const double of_f64 = 8 * static_cast<double>(k) * kEps64, largest = exact[0];
    const Dense products = vectors * gram;
    EXPECT_LE(orthonormality_error(vectors), 2.1 * kEps32 + of_f64);
    for (std::int64_t i = 0; i < r; ++i) {
      const double root = s(matrix, i) / scale;
      EXPECT_NEAR(root * root, exact[i], of_f64 * largest + 2.1 * kEps32 * exact[i]) << i;
      if (i > 0) {
        EXPECT_LE(s(matrix, i), s(matrix, i - 1)) << i;
      }
      const Dense residual = rows_of(products, i, 1) - root * root * rows_of(vectors, i, 1);
      EXPECT_LE(norm(residual), (of_f64 + 3.1 * kEps32) * largest) << i;
    }
  }
};

// Panels of 32 columns, warps of 32 threads, blocks of 512: their edges.
TEST_P(EighTest, EverySize) {
  Random random(1);
  for (const std::int64_t k : {1, 2, 3, 4, 31, 32, 33, 34, 63, 64, 65, 97}) {
    const Dense rows = random.dense(k, k + 5);
    Spectrum exact = jacobi_svd(rows).s;
    for (double& value : exact) value *= value;
    for (const std::int64_t r : {std::int64_t{1}, (k + 2) / 3, k}) check("random", rows * transposed(rows), exact, r);
  }
}

TEST_P(EighTest, MoreColumnsThanABlockHasThreads) {
  Random random(2);
  const std::int64_t k = 530, rank = 5;  // a sum of few squares, whose spectrum is that of a small matrix
  const Dense rows = random.dense(rank, k);
  Spectrum exact = jacobi_svd(rows).s;
  for (double& value : exact) value *= value;
  exact.resize(k);
  check("rank 5", transposed(rows) * rows, exact, 7);
}

TEST_P(EighTest, EverySpectrum) {
  Random random(3);
  const std::int64_t k = 70;
  const std::vector<std::pair<std::string, Spectrum>> spectra = {
      {"zero", Spectrum(k, 0.0)},
      {"identity", Spectrum(k, 1.0)},
      {"rank 1", spectrum_of(k, [](auto i) { return i == 0 ? 2.0 : 0.0; })},
      {"distinct", spectrum_of(k, [](auto i) { return 100.0 - static_cast<double>(i); })},
      {"graded over 1e16", spectrum_of(k, [](auto i) { return std::pow(10.0, -16.0 * static_cast<double>(i) / 69); })},
      {"steps", spectrum_of(k, [](auto i) { return std::pow(1e-3, static_cast<double>(i / 10)); })},
      {"clusters of every size", spectrum_of(k, [](auto i) { return 1 / std::floor(std::sqrt(i + 1.0)); })},
      {"one above a cluster", spectrum_of(k, [](auto i) { return i == 0 ? 1.0 + 1e-9 : 1.0; })},
      {"close, and closer than rounding", spectrum_of(k, [](auto i) { return 1.0 - std::pow(2.0, i - 69.0); })},
      {"rounding errors below rank 10", spectrum_of(k, [](auto i) { return i < 10 ? 1.0 : 1e-15 / (i + 1.0); })},
      {"large", spectrum_of(k, [](auto i) { return 1e76 / (i + 1.0); })},
      {"small", spectrum_of(k, [](auto i) { return 1e-70 / (i + 1.0); })},
  };
  for (const auto& [what, spectrum] : spectra) {
    for (const std::int64_t r : {std::int64_t{9}, k}) {
      check(what, with_eigenvalues(random, spectrum), spectrum, r);
      Spectrum shuffled = spectrum;
      for (std::int64_t i = 0; i < k; ++i) std::swap(shuffled[i], shuffled[random.below(k)]);
      check("diagonal, " + what, diagonal(shuffled), spectrum, r);
    }
  }
}

// Tridiagonal already; its largest eigenvalues come in pairs that agree to all digits, though no element is small.
// (Wilkinson's W+; Golub, Van Loan, 8.4.1)
TEST_P(EighTest, EigenvaluesThatAgreeWithoutASmallElement) {
  const std::int64_t k = 61;
  Dense matrix(k, k);
  for (std::int64_t i = 0; i < k; ++i) {
    matrix(i, i) = std::abs(static_cast<double>(i) - 30) + 2;  // + 2: at least 0
    if (i > 0) matrix(i, i - 1) = matrix(i - 1, i) = 1;
  }
  const Spectrum exact = jacobi_svd(matrix).s;
  ASSERT_LT(exact[0] - exact[1], 1e-14 * exact[0]);
  for (const std::int64_t r : {std::int64_t{8}, k}) check("W+", matrix, exact, r);
}

// A matrix without full rank has as many zeros as it lacks, which are rounding errors: of different signs, closer to
// one another than bisection can tell. Their vectors must be as good as any.
TEST_P(EighTest, ManyZerosThatAreRoundingErrors) {
  Random random(4);
  for (const std::int64_t rank : {1, 4, 40}) {
    const std::int64_t k = 150;
    const Dense factor = random.dense(rank, 200);
    const Dense rows = random.dense(k, rank) * factor;
    Spectrum exact = jacobi_svd(rows).s;
    for (double& value : exact) value *= value;
    check("rank " + std::to_string(rank), rows * transposed(rows), exact, k);
  }
}

// Each matrix of a stack gets what it gets alone, to the bit.
TEST_P(EighTest, EachMatrixOfAStack) {
  Random random(5);
  const std::int64_t k = 37, r = 35;
  std::vector<Dense> grams;
  for (const std::int64_t rank : {37, 5, 0, 37}) {
    const Dense rows = random.dense(k, rank) * random.dense(rank, 40);
    grams.push_back(rows * transposed(rows));
  }
  const Pairs together = leading_eigh(grams, r, 2.0f);
  for (std::size_t i = 0; i < grams.size(); ++i) {
    const Pairs alone = leading_eigh({grams[i]}, r, 2.0f);
    const std::int64_t place = static_cast<std::int64_t>(i);
    EXPECT_EQ(together.flags[i], 0);
    EXPECT_EQ(rows_of(together.s.values(), place, 1).values, alone.s.values().values) << i;
    EXPECT_EQ(together.vectors_of(place).values, alone.vectors_of(0).values) << i;
  }
}

// Wherever it is: the matrix is flagged, no other is touched, and nothing that is not finite comes out.
TEST_P(EighTest, ElementsThatAreNotFinite) {
  Random random(6);
  const std::int64_t k = 40, r = 6;
  const Dense rows = random.dense(k, k);
  const Dense gram = rows * transposed(rows);
  const Pairs expected = leading_eigh({gram}, r, 1.0f);
  for (const double value : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    for (const std::int64_t place : {std::int64_t{0}, std::int64_t{257}, k * k - 1}) {
      for (const int flags : {0, static_cast<int>(cuda::kDependentRows)}) {
        std::vector<Dense> grams(3, gram);
        grams[1].values[place] = value;
        const Pairs pairs = leading_eigh(grams, r, 1.0f, flags);
        EXPECT_EQ(pairs.flags, (std::vector<int>{flags, flags | cuda::kNotConverged, flags}));
        for (const std::int64_t other : {0, 2}) {
          EXPECT_EQ(pairs.vectors_of(other).values, expected.vectors_of(0).values);
        }
        for (const double out : pairs.vectors.values().values) ASSERT_TRUE(std::isfinite(out));
      }
    }
  }
}

PISSA_EVERY_BACKEND(EighTest);

}  // namespace
}  // namespace pissa::test
