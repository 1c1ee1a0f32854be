// orthonormalize: whatever the rows, the result is orthonormal, the earlier rows stay, and the span is kept where the
// rank allows it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

/// New rows [count, dim], given the earlier ones.
struct Rows {
  std::string name;
  bool independent;  // then the span must be kept
  std::function<void(Random&, const Dense& earlier, Dense& rows)> fill;
};

void fill_random(Random& random, const Dense&, Dense& rows) { rows = random.dense(rows.rows, rows.cols); }

void scale_row(Dense& rows, std::int64_t i, double scale) {
  for (std::int64_t k = 0; k < rows.cols; ++k) rows(i, k) *= scale;
}

const std::vector<Rows>& classes() {
  static const std::vector<Rows> all = {
      {"random", true, fill_random},
      {"graded rows", true,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         for (std::int64_t i = 0; i < rows.rows; ++i)
           scale_row(rows, i, std::pow(1e-6, static_cast<double>(i) / rows.rows));
       }},
      {"rows from 1e18 to 1e-18", true,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         for (std::int64_t i = 0; i < rows.rows; ++i)
           scale_row(rows, i, std::pow(10, 18 - 36.0 * static_cast<double>(i) / rows.rows));
       }},
      {"nearly dependent", false,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         for (std::int64_t i = 1; i < rows.rows; ++i) {
           scale_row(rows, i, 1e-6);
           for (std::int64_t k = 0; k < rows.cols; ++k) rows(i, k) += rows(0, k);
         }
       }},
      {"rank 2", false,
       [](Random& random, const Dense&, Dense& rows) {
         rows = random.dense(rows.rows, 2) * random.dense(2, rows.cols);
       }},
      {"zero", false, [](Random&, const Dense&, Dense& rows) { rows = Dense(rows.rows, rows.cols); }},
      {"one zero row", false,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         scale_row(rows, rows.rows / 2, 0);
       }},
      {"duplicate rows", false,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         for (std::int64_t i = 0; i < rows.rows; ++i) {
           for (std::int64_t k = 0; k < rows.cols; ++k) rows(i, k) = rows(i / 2 * 2, k);
         }
       }},
      {"inside the span of the earlier", false,
       [](Random& random, const Dense& earlier, Dense& rows) {
         rows = earlier.rows == 0 ? Dense(rows.rows, rows.cols) : random.dense(rows.rows, earlier.rows) * earlier;
       }},
      {"1e-6 outside the span of the earlier", false,
       [](Random& random, const Dense& earlier, Dense& rows) {
         rows = 1e-6 * random.dense(rows.rows, rows.cols);
         if (earlier.rows > 0) rows = rows + random.dense(rows.rows, earlier.rows) * earlier;
       }},
      {"tiny", true,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         rows = 1e-30 * rows;
       }},
      {"a row whose inverse length is more than f32 holds", false,
       [](Random& random, const Dense& earlier, Dense& rows) {
         fill_random(random, earlier, rows);
         scale_row(rows, rows.rows / 2, 1e-40);
       }},
      {"unit vectors", true,
       [](Random&, const Dense&, Dense& rows) {
         for (std::int64_t i = 0; i < rows.rows; ++i) rows(i, rows.cols - 1 - i) = -2;
       }},
  };
  return all;
}

/// Earlier rows (orthonormal in f32) above new ones, in memory.
Stored stacked(const Dense& earlier, const Dense& rows) {
  Dense all(earlier.rows + rows.rows, rows.cols);
  std::copy(earlier.values.begin(), earlier.values.end(), all.values.begin());
  std::copy(rows.values.begin(), rows.values.end(), all.values.begin() + earlier.rows * rows.cols);
  return Stored(all, Format::f32);
}

class OrthonormalizeTest : public BackendTest {
 protected:
  void check(const Dense& earlier, const Dense& rows, bool independent) const {
    const std::int64_t done = earlier.rows;
    Stored basis = stacked(earlier, rows);
    const Dense before = basis.values();
    backend().orthonormalize(basis.mutable_view(), done, rows.rows, Rank::any);
    const Dense after = basis.values();
    EXPECT_TRUE(basis.padding_intact());
    EXPECT_EQ(rows_of(after, 0, done).values, rows_of(before, 0, done).values) << "the earlier rows changed";
    const double bound = orthonormality_bound(rows.cols);
    EXPECT_LE(orthonormality_error(after), bound);
    if (!independent) return;
    // Row i is a combination of the earlier rows and of new rows up to i, so what is left outside them is rounding.
    for (std::int64_t i = done; i < after.rows; ++i) {
      const Dense row = rows_of(before, i, 1);
      const Dense until = rows_of(after, 0, i + 1);
      const Dense outside = row - (row * transposed(until)) * until;
      EXPECT_LE(norm(outside), 4 * bound * norm(row)) << "row " << i << " is not in the span";
    }
  }
};

TEST_P(OrthonormalizeTest, EveryClassOfRows) {
  Random random(1);
  struct Shape {
    std::int64_t done, count, dim;
  };
  for (const Rows& rows_class : classes()) {
    for (const auto& [done, count, dim] :
         {Shape{0, 1, 1}, Shape{0, 1, 50}, Shape{0, 7, 40}, Shape{0, 16, 16}, Shape{5, 1, 40}, Shape{8, 8, 300},
          Shape{20, 9, 70}, Shape{24, 8, 32}, Shape{31, 1, 32}, Shape{1, 31, 32}, Shape{3, 20, 1100}}) {
      SCOPED_TRACE(::testing::Message() << rows_class.name << ", " << done << " + " << count << " of " << dim);
      const Dense earlier = random_orthonormal(random, done, dim);
      Dense rows(count, dim);
      rows_class.fill(random, earlier, rows);
      check(earlier, rows, rows_class.independent);
    }
  }
}

// The hardest place: what is left after removing the earlier rows is noise, and hardly any of it is new.
TEST_P(OrthonormalizeTest, TheLastDirectionsOfTheSpace) {
  Random random(2);
  for (int trial = 0; trial < 60; ++trial) {
    const std::int64_t dim = 20 + random.below(60);
    const std::int64_t count = 1 + random.below(3);
    SCOPED_TRACE(::testing::Message() << "trial " << trial << ": " << dim - count << " + " << count << " of " << dim);
    const Dense earlier = random_orthonormal(random, dim - count, dim);
    check(earlier, random.dense(count, dim - count) * earlier, false);
  }
}

TEST_P(OrthonormalizeTest, LeavesOrthonormalRowsWhereTheyAre) {
  Random random(3);
  const Dense rows = random_orthonormal(random, 12, 60);
  Stored basis(rows, Format::f32);
  backend().orthonormalize(basis.mutable_view(), 0, 12, Rank::any);
  EXPECT_LE(norm(basis.values() - rows), orthonormality_bound(60) * std::sqrt(12.0))
      << "no signs turned, no rows exchanged";
}

// The last row is a copy, so that all take the way for any rank; the others keep their directions.
TEST_P(OrthonormalizeTest, CompletingRowsTurnsNoSigns) {
  Random random(8);
  for (const auto& [done, count, dim] : {std::tuple{0, 4, 30}, {3, 4, 30}, {7, 5, 20}, {5, 40, 70}}) {
    SCOPED_TRACE(::testing::Message() << done << " + " << count << " of " << dim);
    const Dense earlier = random_orthonormal(random, done, dim);
    Dense rows = random.dense(count, dim);
    for (std::int64_t k = 0; k < dim; ++k) rows(count - 1, k) = rows(0, k);
    Stored basis = stacked(earlier, rows);
    backend().orthonormalize(basis.mutable_view(), done, count, Rank::any);
    const Dense after = basis.values();
    EXPECT_LE(orthonormality_error(after), orthonormality_bound(dim));
    for (std::int64_t i = 0; i + 1 < count; ++i) {
      EXPECT_GT((rows_of(after, done + i, 1) * transposed(rows_of(rows, i, 1)))(0, 0), 0) << "row " << i;
    }
  }
}

TEST_P(OrthonormalizeTest, TheSameBits) {
  for (const Rows& rows_class : classes()) {
    if (rows_class.name != "random" && rows_class.name != "rank 2") continue;  // both ways to the result
    SCOPED_TRACE(rows_class.name);
    Random random(4);
    const Dense earlier = random_orthonormal(random, 20, 700);
    Dense rows(40, 700);
    rows_class.fill(random, earlier, rows);
    expect_same_bits([&](auto& cpu) {
      Stored basis = stacked(earlier, rows);
      cpu.orthonormalize(basis.mutable_view(), 20, 40, Rank::any);
      return basis.bytes();
    });
  }
}

// Rows rounded to bf16 and a companion that is a linear function of them: orthonormal again, and still that function.
TEST_P(OrthonormalizeTest, AgainAfterRoundingWithACompanion) {
  Random random(7);
  for (const auto& [done, count, dim, other] :
       {std::tuple{0, 1, 50, 9}, {0, 16, 40, 70}, {5, 7, 300, 31}, {24, 8, 32, 40}, {30, 20, 1100, 64}}) {
    SCOPED_TRACE(::testing::Message() << done << " + " << count << " of " << dim);
    const Dense orthonormal = random_orthonormal(random, done + count, dim);
    const Dense function = random.dense(dim, other);
    const Dense rounded = rounded_to(kBf16, rows_of(orthonormal, done, count));
    Stored basis = stacked(rows_of(orthonormal, 0, done), rounded);
    Stored companion(basis.values() * function, Format::f32);
    const Dense earlier = rows_of(companion.values(), 0, done);
    backend().reorthonormalize(basis.mutable_view(), companion.mutable_view(), done, count);
    EXPECT_LE(orthonormality_error(basis.values()), orthonormality_bound(dim));
    EXPECT_EQ(rows_of(companion.values(), 0, done).values, earlier.values);
    const Dense difference = companion.values() - basis.values() * function;
    EXPECT_LE(norm(difference), 16 * kEps32 * std::sqrt(dim) * norm(function));
    EXPECT_TRUE(basis.padding_intact() && companion.padding_intact());
  }
}

PISSA_EVERY_BACKEND(OrthonormalizeTest);

}  // namespace
}  // namespace pissa::test
