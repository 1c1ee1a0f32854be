// The NF4 format: levels, rounding, scales, and the kernels that read and write it.
#include "pissa/core/nf4.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "pissa/core/nested_scales.h"
#include "support/isa_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

TEST(Nf4Format, LevelsAscendFromMinusOneThroughZeroToOne) {
  EXPECT_TRUE(std::is_sorted(std::begin(kNf4Levels), std::end(kNf4Levels)));
  EXPECT_EQ(kNf4Levels[0], -1.0f);
  EXPECT_EQ(kNf4Levels[7], 0.0f);
  EXPECT_EQ(kNf4Levels[15], 1.0f);
  EXPECT_TRUE(std::is_sorted(std::begin(kDynamicMap), std::end(kDynamicMap)));
  EXPECT_EQ(kDynamicMap[127], 0.0f);
  EXPECT_EQ(kDynamicMap[255], 1.0f);
}

TEST(Nf4Format, AThresholdBelongsToTheLowerLevel) {
  for (int i = 0; i < 15; ++i) {
    const float threshold = kNf4Thresholds.value[i];
    EXPECT_EQ(nf4_code(threshold), i);
    EXPECT_EQ(nf4_code(std::nextafter(threshold, 2.0f)), i + 1);
    EXPECT_EQ(nf4_code(std::nextafter(threshold, -2.0f)), i);
  }
}

// Up to the rounding of a threshold to f32, by which a point may lie on the wrong side of it.
TEST(Nf4Format, TheCodeIsThatOfTheNearestLevel) {
  for (int i = -1000; i <= 1000; ++i) {
    const double scaled = i / 1000.0;
    double nearest = 2;
    for (const float level : kNf4Levels) nearest = std::min(nearest, std::fabs(scaled - level));
    EXPECT_LE(std::fabs(scaled - kNf4Levels[nf4_code(static_cast<float>(scaled))]), nearest + 0x1p-23) << scaled;
  }
}

// Half a step of the grid of 2^16 points, and the rounding of the arithmetic on it.
TEST(Nf4Format, TheDynamicCodeIsThatOfTheNearestLevel) {
  for (int i = -4000; i <= 4000; ++i) {
    const double scaled = i / 4000.0;
    double nearest = 2;
    for (const float level : kDynamicMap) nearest = std::min(nearest, std::fabs(scaled - level));
    const double grid = 2 * (0.5 / 32767.5 + 0x1p-23);
    EXPECT_LE(std::fabs(scaled - kDynamicMap[dynamic_code(dynamic_point(static_cast<float>(scaled)))]), nearest + grid)
        << scaled;
  }
}

TEST(Nf4Format, BlockSizesArePowersOfTwoFrom32To4096) {
  std::vector<std::int64_t> allowed;
  for (std::int64_t size = -64; size <= 10000; ++size) {
    if (is_blocksize(Format::nf4, size, 100)) allowed.push_back(size);
  }
  EXPECT_EQ(allowed, (std::vector<std::int64_t>{32, 64, 128, 256, 512, 1024, 2048, 4096}));
}

TEST(Nf4Format, AnOddNumberOfElementsTakesHalfAByteMore) {
  EXPECT_EQ(code_bytes(Format::nf4, 0), 0);
  EXPECT_EQ(code_bytes(Format::nf4, 1), 1);
  EXPECT_EQ(code_bytes(Format::nf4, 2), 1);
  EXPECT_EQ(code_bytes(Format::nf4, 65), 33);
}

class Nf4Test : public IsaTest {};

// Around every place where a code changes, and where the search for it changes its table entry, by single ulps.
TEST_P(Nf4Test, QuantizesTheNeighboursOfEveryThreshold) {
  std::vector<float> values{1.0f, -1.0f, 0.0f, -0.0f};
  const auto add_around = [&](float value) {
    float above = value;
    float below = value;
    values.push_back(value);
    for (int ulp = 0; ulp < 8; ++ulp) {
      values.push_back(above = std::nextafter(above, 2.0f));
      values.push_back(below = std::nextafter(below, -2.0f));
    }
  };
  for (const float threshold : kNf4Thresholds.value) add_around(threshold);
  for (int cell = 1; cell < 32; ++cell) add_around((static_cast<float>(cell) - 15.95f) / 15.9f);
  for (std::size_t i = 0; i < values.size(); i += 63) values.insert(values.begin() + i, 1.0f);  // absmax of each block
  values.resize(values.size() / 64 * 64 + 64, 0.0f);
  values.back() = 1.0f;
  std::vector<std::uint8_t> codes(values.size() / 2);
  std::vector<float> absmax(values.size() / 64);
  kernels().quantize(Format::nf4, values.data(), values.size(), 64, 1.0f, codes.data(), absmax.data());
  for (const float largest : absmax) ASSERT_EQ(largest, 1.0f);
  for (std::size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ((codes[i / 2] >> (i % 2 == 0 ? 4 : 0)) & 15, nf4_code(values[i])) << values[i];
  }
}

PISSA_EVERY_ISA(Nf4Test);

}  // namespace
}  // namespace pissa::test
