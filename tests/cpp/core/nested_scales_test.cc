// quantize_absmax: the scales of NF4 blocks in 8 bits.
#include "pissa/core/nested_scales.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

class NestedScalesTest : public BackendTest {};

TEST_P(NestedScalesTest, AreQuantizedInBlocksOf256) {
  Random random(5);
  for (const std::int64_t count : {1, 255, 256, 257, 700}) {
    std::vector<float> absmax(count);
    for (float& value : absmax) value = static_cast<float>(std::exp(random.normal()));
    const float offset = 1.5f;
    std::vector<std::uint8_t> codes8(count + 1, 0xee);
    std::vector<float> nested(ceil_div(count, 256) + 1, -9.0f);
    backend().quantize_absmax(absmax.data(), count, &offset, codes8.data(), nested.data());
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t first = i / 256 * 256;
      float largest = 0.0f;
      for (std::int64_t j = first; j < std::min<std::int64_t>(first + 256, count); ++j) {
        largest = std::max(largest, std::fabs(absmax[j] - offset));
      }
      ASSERT_EQ(nested[i / 256], largest);
      ASSERT_EQ(codes8[i], dynamic_code(dynamic_point((absmax[i] - offset) / largest)));
    }
    EXPECT_EQ(codes8.back(), 0xee);
    EXPECT_EQ(nested.back(), -9.0f);
  }
}

TEST_P(NestedScalesTest, WhatIsNotFiniteHasACodeToo) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const float offset : {1.5f, infinity}) {
    const std::vector<float> absmax{1.0f, infinity, 2.0f, std::nanf("")};
    std::vector<std::uint8_t> codes8(5, 0xee);
    std::vector<float> nested(1);
    backend().quantize_absmax(absmax.data(), 4, &offset, codes8.data(), nested.data());
    EXPECT_EQ(nested[0], infinity);
    EXPECT_EQ(codes8[1], dynamic_code(0));  // Inf / Inf
    EXPECT_EQ(codes8[3], dynamic_code(0));
    EXPECT_EQ(codes8[4], 0xee);
  }
}

TEST_P(NestedScalesTest, TheSameBits) {
  Random random(6);
  std::vector<float> absmax(2100);
  for (float& value : absmax) value = static_cast<float>(random.uniform());
  const float offset = 0.5f;
  expect_same_bits([&](auto& cpu) {
    std::vector<std::uint8_t> codes8(2100);
    std::vector<float> nested(9);
    cpu.quantize_absmax(absmax.data(), 2100, &offset, codes8.data(), nested.data());
    return std::pair(codes8, nested);
  });
}

PISSA_EVERY_BACKEND(NestedScalesTest);

}  // namespace
}  // namespace pissa::test
