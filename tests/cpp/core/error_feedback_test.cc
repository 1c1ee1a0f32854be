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

// The number of a code that has bytes of its own, or is the first of its byte.
float number_of(Format format, int code) {
  if (format == Format::int8) return static_cast<float>(static_cast<std::int8_t>(code));
  if (format == Format::fp8) return static_cast<float>(kE4m3.decode(static_cast<std::uint32_t>(code)));
  const std::uint8_t codes[8] = {static_cast<std::uint8_t>(code)};
  return level_at(format, codes, 0);
}

float times(Format format, float number, float scale) {
  return format == Format::int8 ? int8_element(number, scale) : number * scale;
}

// Element i of the flattened matrix.
float element(const Matrix& matrix, std::int64_t i) {
  const float number = info(matrix.format).bits == 8
                           ? number_of(matrix.format, static_cast<const std::uint8_t*>(matrix.data)[i])
                           : level_at(matrix.format, matrix.data, i);
  return times(matrix.format, number, scale_of(matrix, i));
}

// Of all elements that its scale allows.
double nearest_distance(const Matrix& matrix, std::int64_t i, double value) {
  double least = HUGE_VAL;
  for (int code = 0; code < 256; ++code) {
    if (info(matrix.format).bits == 8 && (matrix.format == Format::fp8 ? code % 128 == 127 : code == 128)) continue;
    const float each = times(matrix.format, number_of(matrix.format, code), scale_of(matrix, i));
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
    for (const Form form : {Form::nf4, Form::nf4_nested, Form::int8, Form::mxfp4, Form::nvfp4, Form::int4, Form::fp8}) {
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
