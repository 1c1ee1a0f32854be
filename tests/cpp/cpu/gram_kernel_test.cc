// The kernel of Gram matrices.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "support/isa_test.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

class GramKernelTest : public IsaTest {};

// Rows [first, last), at and below the diagonal, are right to float64; the rest is not touched.
TEST_P(GramKernelTest, IsAccurateToFloat64) {
  Random random(1);
  struct Range {
    std::int64_t count, cols, first, last;
  };
  for (const auto& [count, cols, first, last] :
       {Range{1, 1, 0, 1}, Range{9, 0, 0, 9}, Range{13, 37, 0, 13}, Range{13, 37, 5, 9}, Range{8, 2047, 0, 8},
        Range{7, 2049, 3, 7}, Range{5, 5000, 0, 5}}) {
    SCOPED_TRACE(::testing::Message() << count << " x " << cols << ", rows " << first << " to " << last);
    const Stored rows(random.dense(count, cols), Format::f32), others(random.dense(count, cols), Format::f32);
    const Dense expected = rows.values() * transposed(others.values());
    const Dense magnitude = absolute(rows.values()) * transposed(absolute(others.values()));
    const std::int64_t ld = count + 2;
    std::vector<double> gram(count * ld, -9.0);
    kernels().gram(static_cast<const float*>(rows.view().data), static_cast<const float*>(others.view().data), cols,
                   rows.view().ld, first, last, gram.data(), ld);
    for (std::int64_t i = 0; i < count; ++i) {
      for (std::int64_t j = 0; j < ld; ++j) {
        if (i < first || i >= last || j > i) ASSERT_EQ(gram[i * ld + j], -9.0) << i << ", " << j;
        else
          ASSERT_NEAR(gram[i * ld + j], expected(i, j), 2 * gamma(cols + 1, kEps64) * magnitude(i, j))
              << i << ", " << j;
      }
    }
  }
}

PISSA_EVERY_ISA(GramKernelTest);

}  // namespace
}  // namespace pissa::test
