// Float64 arithmetic and the error bounds that belong to it.
//
// Bounds are the standard ones of floating-point analysis (Higham, Accuracy and Stability of Numerical Algorithms, ch.
// 3): a sum of n products in f32, in any order, fused or not, errs by at most gamma(n + 1) * sum |a_k||b_k|. So a
// reference carries the same expression of absolute values, and bounds |computed - exact| elementwise without knowing
// the data.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pissa/core/types.h"
#include "support/formats.h"
#include "support/matrices.h"

namespace pissa::test {

inline constexpr double kEps32 = 0x1p-24;  // unit roundoff of f32
inline constexpr double kEps64 = 0x1p-53;

inline double gamma(std::int64_t roundings, double unit = kEps32) {
  const double n = static_cast<double>(roundings);
  return n * unit / (1 - n * unit);
}

inline Dense transposed(const Dense& a) {
  Dense result(a.cols, a.rows);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t j = 0; j < a.cols; ++j) result(j, i) = a(i, j);
  }
  return result;
}

inline Dense oriented(const Dense& a, Op op) { return op == Op::n ? a : transposed(a); }

inline Dense absolute(Dense a) {
  for (double& value : a.values) value = std::fabs(value);
  return a;
}

inline Dense operator*(const Dense& a, const Dense& b) {
  Dense result(a.rows, b.cols);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t k = 0; k < a.cols; ++k) {
      const double a_ik = a(i, k);
      const double* from = b.values.data() + k * b.cols;
      double* to = result.values.data() + i * b.cols;
      for (std::int64_t j = 0; j < b.cols; ++j) to[j] += a_ik * from[j];
    }
  }
  return result;
}

inline Dense operator*(double scale, Dense a) {
  for (double& value : a.values) value *= scale;
  return a;
}

/// Sum; an operand of one row is added to every row.
inline Dense operator+(Dense a, const Dense& b) {
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t j = 0; j < a.cols; ++j) a(i, j) += b(b.rows == 1 ? 0 : i, j);
  }
  return a;
}

inline Dense operator-(const Dense& a, const Dense& b) { return a + -1.0 * b; }

inline double norm(const Dense& a) {
  double largest = 0;
  for (const double value : a.values) largest = std::max(largest, std::fabs(value));
  if (largest == 0) return 0;
  double sum = 0;
  for (const double value : a.values) sum += (value / largest) * (value / largest);
  return largest * std::sqrt(sum);
}

/// A float64 result and the same expression of absolute values.
struct Bounded {
  Dense value;
  Dense magnitude;
};

inline Bounded bounded(const Dense& values) { return {values, absolute(values)}; }

/// What a Precision may do to an operand. bf16 takes denormals for zero, which the tests' numbers never are.
inline Dense rounded_to(const FloatFormat& format, Dense a) {
  for (double& value : a.values) value = format.decode(format.encode(value));
  return a;
}

/// Every element is finite and within the error of `roundings` roundings in f32, `bf16_roundings` to bf16 and a last
/// one to `format`; nothing else was written. Reports the worst element.
inline void expect_close(const Stored& actual, const Bounded& expected, std::int64_t roundings,
                         std::int64_t bf16_roundings = 0) {
  const FloatFormat out = float_format(actual.format());
  const bool rounds = actual.format() != Format::f32;  // otherwise `roundings` has it
  const Dense values = actual.values();
  ASSERT_EQ(values.rows, expected.value.rows);
  ASSERT_EQ(values.cols, expected.value.cols);
  double worst = 0;
  std::int64_t where = 0;
  for (std::size_t i = 0; i < values.values.size(); ++i) {
    const double exact = expected.value.values[i];
    const double computed =
        (gamma(roundings) + gamma(bf16_roundings, kBf16.unit_roundoff())) * expected.magnitude.values[i];
    const double rounding =
        rounds ? (std::fabs(exact) + computed) * out.unit_roundoff() + out.half_subnormal() : 0x1p-149;
    const double error = std::fabs(values.values[i] - exact) / (computed + rounding);
    if (!(error <= worst)) {
      worst = error;
      where = static_cast<std::int64_t>(i);
      if (std::isnan(worst)) break;
    }
  }
  if (!(worst <= 1)) {
    ADD_FAILURE() << "element [" << where / values.cols << ", " << where % values.cols << "] of [" << values.rows
                  << ", " << values.cols << "] " << name(actual.format()) << ": got " << values.values[where]
                  << ", expected " << expected.value.values[where] << ", " << worst << " times the error bound";
  }
  EXPECT_TRUE(actual.padding_intact()) << "wrote outside the output";
}

}  // namespace pissa::test
