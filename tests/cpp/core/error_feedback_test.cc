// Codes by error feedback: each is the one nearest to what it should be, given the errors behind it.
#include "pissa/core/error_feedback.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

class ErrorFeedbackTest : public BackendTest {};

float scale_of(const Matrix& matrix, std::int64_t i) {
  const Scales& scales = matrix.scales;
  const std::int64_t block = i / scales.blocksize;
  if (scales.absmax) return scales.absmax[block];
  const float product = kDynamicMap[scales.absmax8[block]] * scales.nested_absmax[block / 256];
  return product + *scales.offset;
}

// Element i of the flattened matrix.
float element(const Matrix& matrix, std::int64_t i) {
  if (matrix.format != Format::int8) return level_at(matrix.format, matrix.data, i) * scale_of(matrix, i);
  return int8_element(static_cast<const std::int8_t*>(matrix.data)[i], scale_of(matrix, i));
}

// Of all elements that its scale allows.
double nearest_distance(const Matrix& matrix, std::int64_t i, double value) {
  double least = HUGE_VAL;
  for (int code = -127; code <= 127; ++code) {
    const std::uint8_t codes[8] = {static_cast<std::uint8_t>(code)};
    const float scale = scale_of(matrix, i);
    const float each = matrix.format == Format::int8 ? int8_element(static_cast<float>(code), scale)
                                                     : level_at(matrix.format, codes, 0) * scale;
    least = std::min(least, std::fabs(value - double{each}));
  }
  return least;
}

TEST_P(ErrorFeedbackTest, EveryCodeIsNearestGivenTheErrorsBehindIt) {
  Random random(1);
  struct Shape {
    std::int64_t rows, cols;
  };
  for (const auto& [rows, cols] : {Shape{1, 8}, Shape{3, 56}, Shape{65, 64}, Shape{9, 72}, Shape{70, 224}}) {
    Dense lower = random.dense(cols, cols);  // of a second moment with long memory: sums outweigh elements
    for (std::int64_t j = 0; j < cols; ++j) lower(j, j) = 0.5 + random.uniform();
    const Stored factor(lower, Format::f32);
    const Dense l = factor.values();
    for (const Form form : {Form::nf4, Form::nf4_nested, Form::int8, Form::nf3, Form::nf2}) {
      SCOPED_TRACE(::testing::Message() << "[" << rows << ", " << cols << "] " << name(form));
      const Operand like(random, rows, cols, form);
      const Stored weight(random.dense(rows, cols), random.pick(kFloatFormats), 3);
      Matrix result = like.view();
      std::vector<std::uint8_t> codes(code_bytes(result.format, rows * cols) + 1, 0xee);
      result.data = codes.data();
      auto on = backend();
      quantize_with_feedback(on, weight.view(), factor.view(), result.format, result.scales, codes.data());
      EXPECT_EQ(codes.back(), 0xee);

      const Dense w = weight.values();
      Dense errors(rows, cols);
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t j = cols - 1; j >= 0; --j) {
          const std::int64_t at = i * cols + j;
          const double chosen = element(result, at);
          double sum = 0, magnitude = std::fabs(w(i, j)) + std::fabs(chosen);
          for (std::int64_t k = j + 1; k < cols; ++k) {
            sum += errors(i, k) * l(k, j) / l(j, j);
            magnitude += std::fabs(errors(i, k) * l(k, j) / l(j, j));
          }
          const double wanted = w(i, j) + sum;
          // Rounded are the errors, the sum, its quotient, and the way to the code: a division, a factor of the search.
          const double bound = gamma(cols - j + 12) * magnitude + 0x1p-149;
          ASSERT_LE(std::fabs(wanted - chosen), nearest_distance(result, at, wanted) + 2 * bound) << i << ", " << j;
          errors(i, j) = w(i, j) - chosen;
        }
      }
    }
  }
}

TEST_P(ErrorFeedbackTest, RefusesWhatDoesNotFit) {
  Random random(2);
  const Stored weight(random.dense(4, 7), Format::f32), factor(random.dense(7, 7), Format::f32);
  const Operand like(random, 4, 7, Form::nf4);
  std::vector<std::uint8_t> codes(14);
  auto on = backend();
  EXPECT_THROW(quantize_with_feedback(on, weight.view(), factor.view(), Format::nf4, like.view().scales, codes.data()),
               std::invalid_argument);
  const Stored even(random.dense(4, 8), Format::f32);
  EXPECT_THROW(quantize_with_feedback(on, even.view(), factor.view(), Format::nf4, like.view().scales, codes.data()),
               std::invalid_argument);
}

PISSA_EVERY_BACKEND(ErrorFeedbackTest);

}  // namespace
}  // namespace pissa::test
