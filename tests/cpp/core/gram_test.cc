// The Gram matrix in float64 and its eigenvectors.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

class GramTest : public BackendTest {};

TEST_P(GramTest, EigenvaluesAreSquaredSingularValues) {
  Random random(2);
  for (const auto& [count, cols, wanted] :
       {std::tuple{1, 1, 1}, {6, 40, 6}, {21, 300, 5}, {30, 12, 30}, {17, 2100, 4}, {260, 3, 2}}) {
    SCOPED_TRACE(::testing::Message() << count << " x " << cols << ", " << wanted << " wanted");
    const Stored rows(random.dense(count, cols), Format::f32);
    Stored s = Stored::poisoned(1, wanted, Format::f32);
    Stored vectors = Stored::poisoned(wanted, count, Format::f32);
    backend().gram_svd(rows.view(), rows.view(), 0.25f, s.mutable_view(), vectors.mutable_view());
    EXPECT_TRUE(s.padding_intact() && vectors.padding_intact());
    const Dense values = 4.0 * s.values();
    const Svd reference = jacobi_svd(rows.values());
    const double largest = reference.s[0] * reference.s[0];
    const double tolerance =
        16 * count * kEps64 * largest;  // backward error of the eigenproblem and of the Gram matrix
    for (int i = 0; i < wanted; ++i) {
      const bool within_rank = i < static_cast<int>(reference.s.size());
      const double exact = within_rank ? reference.s[i] * reference.s[i] : 0;
      EXPECT_NEAR(values(0, i) * values(0, i), exact, tolerance + 3 * kEps32 * exact);  // s is rounded to f32
      EXPECT_GE(values(0, i), 0.0);
      if (i > 0) {
        EXPECT_LE(values(0, i), values(0, i - 1));
      }
    }
    // The vectors are rounded to f32: elementwise, so by at most eps32 in norm.
    EXPECT_LE(orthonormality_error(vectors.values()), 2 * kEps32 + tolerance / largest);
    const Dense projected = vectors.values() * rows.values();
    const Dense gram = projected * transposed(projected);
    for (int i = 0; i < wanted; ++i) EXPECT_NEAR(gram(i, i), values(0, i) * values(0, i), 6 * kEps32 * largest);
  }
}

// Of a large matrix only the leading eigenvectors are computed, by another way, which has to cope with eigenvalues that
// are equal, that are 0, and that the tridiagonal form separates.
TEST_P(GramTest, LeadingEigenvectorsOfALargeMatrix) {
  Random random(4);
  const std::int64_t count = 130;
  const auto graded = [](std::int64_t i) { return std::pow(10.0, -static_cast<double>(i) / 20); };
  const auto clustered = [](std::int64_t i) { return 1 + (i < 3 ? 2.0 : i < 40 ? 1.0 + 1e-9 * i : 0.1 / (i + 1)); };
  const auto equal = [](std::int64_t i) { return i < 50 ? 3.0 : 1.0; };
  const auto rank_deficient = [](std::int64_t i) { return i < 11 ? 1.0 / (i + 1) : 0.0; };
  for (const std::function<double(std::int64_t)>& spectrum :
       {std::function<double(std::int64_t)>(graded), {clustered}, {equal}, {rank_deficient}}) {
    for (const bool diagonal : {false, true}) {
      Dense values(count, 200);
      for (std::int64_t i = 0; i < count; ++i) values(i, (7 * i) % 200) = spectrum(i);
      if (!diagonal) values = random_orthonormal(random, count, count) * values;
      const Stored rows(values, Format::f32);
      const std::int64_t wanted = 17;
      Stored s = Stored::poisoned(1, wanted, Format::f32);
      Stored vectors = Stored::poisoned(wanted, count, Format::f32);
      backend().gram_svd(rows.view(), rows.view(), 1.0f, s.mutable_view(), vectors.mutable_view());
      const Dense found = s.values();
      EXPECT_LE(orthonormality_error(vectors.values()), 4 * kEps32);
      const Dense projected = vectors.values() * rows.values();
      const Dense gram = projected * transposed(projected);
      for (std::int64_t i = 0; i < wanted; ++i) {
        const double exact = spectrum(i) * spectrum(i);
        EXPECT_NEAR(found(0, i) * found(0, i), exact, 8 * kEps32 * spectrum(0) * spectrum(0)) << i;  // the rows are f32
        EXPECT_NEAR(gram(i, i), exact, 8 * kEps32 * spectrum(0) * spectrum(0)) << i;
      }
    }
  }
}

TEST_P(GramTest, TheSameBits) {
  Random random(3);
  const Stored rows(random.dense(37, 2100), Format::f32);
  expect_same_bits([&](auto& cpu) {
    Stored s = Stored::poisoned(1, 37, Format::f32);
    Stored vectors = Stored::poisoned(37, 37, Format::f32);
    cpu.gram_svd(rows.view(), rows.view(), 1.0f, s.mutable_view(), vectors.mutable_view());
    return std::pair(s.bytes(), vectors.bytes());
  });
}

PISSA_EVERY_BACKEND(GramTest);

}  // namespace
}  // namespace pissa::test
