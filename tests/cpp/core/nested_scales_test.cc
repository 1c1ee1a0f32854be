// quantize_absmax: the scales of NF4 blocks in 8 bits.
#include "pissa/core/nested_scales.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

struct Result {
  std::vector<std::uint8_t> codes8;
  std::vector<float> nested;
  float offset;
  bool operator==(const Result&) const = default;
};

class NestedScalesTest : public BackendTest {
 protected:
  static std::vector<float> scales(Random& random, std::int64_t count) {
    std::vector<float> absmax(count);
    for (float& value : absmax) value = static_cast<float>(std::exp(random.normal()));
    return absmax;
  }

  // With an element more than there is room for, which nothing may write.
  template <class B>
  static Result quantize(B&& backend, const std::vector<float>& absmax, const float* given) {
    const std::int64_t count = static_cast<std::int64_t>(absmax.size());
    Result result{std::vector<std::uint8_t>(count + 1, 0xee), std::vector<float>(ceil_div(count, 256) + 1, -9.0f),
                  -9.0f};
    backend.quantize_absmax(absmax.data(), count, given, result.codes8.data(), result.nested.data(), &result.offset);
    return result;
  }
  Result quantize(const std::vector<float>& absmax, const float* given) const {
    return quantize(backend(), absmax, given);
  }
};

TEST_P(NestedScalesTest, AreQuantizedInBlocksOf256) {
  Random random(5);
  for (const std::int64_t count : {1, 255, 256, 257, 700}) {
    const std::vector<float> absmax = scales(random, count);
    const float offset = 1.5f;
    const Result result = quantize(absmax, &offset);
    ASSERT_EQ(result.offset, offset);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t first = i / 256 * 256;
      float largest = 0.0f;
      for (std::int64_t j = first; j < std::min<std::int64_t>(first + 256, count); ++j) {
        largest = std::max(largest, std::fabs(absmax[j] - offset));
      }
      ASSERT_EQ(result.nested[i / 256], largest);
      ASSERT_EQ(result.codes8[i], dynamic_code(dynamic_point((absmax[i] - offset) / largest)));
    }
    EXPECT_EQ(result.codes8.back(), 0xee);
    EXPECT_EQ(result.nested.back(), -9.0f);
  }
}

// 65536 scales and more: a GPU adds up 256 shares of them, first of 256 each and then of 512.
TEST_P(NestedScalesTest, AreTakenLessTheirMean) {
  Random random(7);
  for (const std::int64_t count : {1, 31, 256, 257, 5000, 65536, 65537, 70001}) {
    std::vector<float> absmax = scales(random, count);
    absmax.back() = static_cast<float>(count);  // whoever forgets it is far off
    double sum = 0;
    for (const float value : absmax) sum += value;
    const double mean = sum / static_cast<double>(count);
    const Result result = quantize(absmax, nullptr);
    // One rounding to f32; sums in f64 differ by less than count * 2^-53 of the mean, which is 2^-36.
    EXPECT_NEAR(result.offset, mean, (0x1p-24 + 0x1p-36) * mean) << count;
    EXPECT_TRUE(quantize(absmax, &result.offset) == result) << count;
  }
}

// NaN, and what is left of Inf less Inf, stay; nobody knows a code of them.
TEST_P(NestedScalesTest, WhatIsNotFiniteStays) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const float offset = 1.5f;
  for (const std::size_t at : {0, 31, 32, 100, 255}) {
    for (const float bad : {nan, -nan, infinity}) {
      std::vector<float> absmax(600, 2.0f);
      const Result good = quantize(absmax, &offset);
      absmax[256 + at] = bad;
      const Result result = quantize(absmax, &offset);
      if (bad == infinity) EXPECT_EQ(result.nested[1], infinity);
      else EXPECT_TRUE(std::isnan(result.nested[1])) << at;
      for (const std::size_t block : {0, 2}) EXPECT_EQ(result.nested[block], good.nested[block]);
      EXPECT_EQ(result.codes8.back(), 0xee);
      EXPECT_EQ(std::isnan(quantize(absmax, nullptr).offset), bad != infinity);
      EXPECT_EQ(std::isinf(quantize(absmax, nullptr).offset), bad == infinity);
      EXPECT_TRUE(std::isnan(quantize(absmax, &infinity).nested[1]))
          << "an infinite mean of what is not finite: " << at;
    }
  }
  EXPECT_EQ(quantize(std::vector<float>(300, 1.0f), &infinity).nested[0], infinity) << "of what is finite";
}

TEST_P(NestedScalesTest, TheSameBits) {
  Random random(6);
  std::vector<float> absmax(70000);
  for (float& value : absmax) value = static_cast<float>(random.uniform());
  expect_same_bits([&](auto& cpu) { return quantize(cpu, absmax, nullptr); });
}

PISSA_EVERY_BACKEND(NestedScalesTest);

}  // namespace
}  // namespace pissa::test
