// The tests' own arithmetic, on cases whose results are known.
#include "support/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "support/orthogonal.h"
#include "support/weight_classes.h"

namespace pissa::test {
namespace {

TEST(Reference, FormatsOfKnownNumbers) {
  EXPECT_EQ(kF16.encode(1.0), 0x3c00u);
  EXPECT_EQ(kF16.encode(-65504.0), 0xfbffu);
  EXPECT_EQ(kF16.encode(65520.0), 0x7c00u);
  EXPECT_EQ(kF16.encode(0x1p-24), 0x0001u);
  EXPECT_EQ(kF16.encode(0x1p-14), 0x0400u);
  EXPECT_EQ(kF16.encode(1 + 0x1p-11), 0x3c00u) << "a tie, to even";
  EXPECT_EQ(kF16.encode(1 + 0x3p-11), 0x3c02u) << "a tie, to even";
  EXPECT_EQ(kBf16.encode(1.0), 0x3f80u);
  EXPECT_EQ(kBf16.encode(-0.0), 0x8000u);
  EXPECT_EQ(kBf16.encode(1 + 0x1.01p-8), 0x3f81u);
  EXPECT_EQ(kF16.decode(0x3555), 0x1.554p-2);
  EXPECT_EQ(kBf16.decode(0x0001), 0x1p-133);
  EXPECT_EQ(kBf16.decode(0xff80), -HUGE_VAL);
  EXPECT_TRUE(std::isnan(kF16.decode(0x7c01)));
}

TEST(Reference, JacobiFindsAKnownDecomposition) {
  Random random(1);
  for (const auto& [rows, cols] : {std::pair{20, 30}, {30, 20}}) {
    const Dense w =
        with_spectrum(random, rows, cols, [](std::int64_t i) { return i < 12 ? std::pow(2.0, -i / 2) : 0; });
    const Svd svd = jacobi_svd(w);
    for (std::int64_t i = 0; i < 20; ++i) EXPECT_NEAR(svd.s[i], i < 12 ? std::pow(2.0, -i / 2) : 0, 1e-13);
    const Dense v = rows_of(svd.v, 0, 12);
    EXPECT_LE(orthonormality_error(v), 1e-13);
    EXPECT_LE(norm(w - (w * transposed(v)) * v), 1e-13);
  }
}

TEST(Reference, OrthonormalizationCompletesDependentRows) {
  Dense rows(4, 6);
  rows(0, 0) = 2;
  rows(1, 0) = 3;
  rows(2, 1) = -1;
  EXPECT_EQ(orthonormality_error(rows), 8);
  orthonormalize_rows(rows);
  EXPECT_LE(orthonormality_error(rows), 1e-15);
  EXPECT_EQ(rows(0, 0), 1);
}

}  // namespace
}  // namespace pissa::test
