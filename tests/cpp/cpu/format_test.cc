// Decoding and encoding of rows, by every instruction set, against the definitions of the formats.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "support/formats.h"
#include "support/isa_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

class FormatTest : public IsaTest {
 protected:
  std::vector<float> decode(Format format, const std::vector<std::uint16_t>& bits) const {
    std::vector<float> values(bits.size(), std::numeric_limits<float>::quiet_NaN());
    const std::int64_t count = static_cast<std::int64_t>(bits.size());
    kernels().decode({bits.data(), 1, count, count, format}, 0, 0, count, values.data());
    return values;
  }
  std::vector<std::uint16_t> encode(Format format, const std::vector<float>& values) const {
    std::vector<std::uint16_t> bits(values.size(), 0xffff);
    kernels().encode(values.data(), static_cast<std::int64_t>(values.size()), format, bits.data());
    return bits;
  }
  void expect_encoded(Format format, const std::vector<float>& values) const {
    const std::vector<std::uint16_t> bits = encode(format, values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (std::isnan(values[i]))
        EXPECT_TRUE(std::isnan(float_format(format).decode(bits[i]))) << "a NaN became a number";
      else ASSERT_EQ(bits[i], float_format(format).encode(values[i])) << std::hexfloat << values[i];
    }
  }
};

constexpr Format kHalves[] = {Format::bf16, Format::f16};

std::vector<std::uint16_t> all_patterns() {
  std::vector<std::uint16_t> bits(1 << 16);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
  return bits;
}

TEST_P(FormatTest, DecodesEveryBitPattern) {
  for (const Format format : kHalves) {
    const std::vector<float> values = decode(format, all_patterns());
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double expected = float_format(format).decode(static_cast<std::uint32_t>(i));
      if (std::isnan(expected)) ASSERT_TRUE(std::isnan(values[i])) << i;
      else
        ASSERT_EQ(std::bit_cast<std::uint32_t>(values[i]), std::bit_cast<std::uint32_t>(static_cast<float>(expected)))
            << i;
    }
  }
}

// Each number, and between it and its neighbour the middle, the f32 numbers next to it, and those next to the
// neighbours.
TEST_P(FormatTest, RoundsToNearestEven) {
  for (const Format format : kHalves) {
    const std::uint32_t infinity = float_format(format).encode(std::numeric_limits<double>::infinity());
    std::vector<float> values;
    for (std::uint32_t bits = 0; bits < infinity; ++bits) {
      const double low = float_format(format).decode(bits);
      const double high =
          bits + 1 < infinity ? float_format(format).decode(bits + 1) : 2 * low - float_format(format).decode(bits - 1);
      const float middle =
          static_cast<float>((low + high) / 2);  // exact, except beyond the largest bf16: Inf, as it should
      for (const float sign : {1.0f, -1.0f}) {
        for (const float value :
             {static_cast<float>(low), std::nextafter(static_cast<float>(low), INFINITY), std::nextafter(middle, 0.0f),
              middle, std::nextafter(middle, INFINITY), std::nextafter(static_cast<float>(high), 0.0f)}) {
          values.push_back(sign * value);
        }
      }
    }
    expect_encoded(format, values);
  }
}

TEST_P(FormatTest, RoundsSpecialValues) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kMax = std::numeric_limits<float>::max();
  for (const Format format : kHalves) {
    expect_encoded(format,
                   {0.0f, -0.0f, kInf, -kInf, kMax, -kMax, 65504.0f, 65519.99f, 65520.0f, 65536.0f, 1e30f, 0x1p-24f,
                    0x1p-25f, 0x1.000002p-25f, 0x1p-26f, 0x1p-133f, 0x1p-134f, 0x1p-149f, 0x1.fffffep-15f});
    const std::uint32_t nans[] = {0x7fc00000, 0xffc00000, 0x7f800001, 0xff800001, 0x7fffffff, 0xffffffff, 0x7f80ffff};
    for (const std::uint32_t bits : nans) {
      const std::vector<float> values(75, std::bit_cast<float>(bits));
      expect_encoded(format, values);
      if (format != Format::bf16) continue;  // which keeps the sign and what fits of the rest
      for (const std::uint16_t half : encode(format, values)) ASSERT_EQ(half, bits >> 16 | 0x40) << bits;
    }
  }
}

// Every length up to several vectors, from every misalignment: right values, and nothing beyond them.
TEST_P(FormatTest, EveryLengthAndAlignment) {
  constexpr std::int64_t kMost = 70;
  constexpr std::uint16_t kUntouched = 0x5a5a;
  for (const Format format : kHalves) {
    for (std::int64_t start = 0; start < 5; ++start) {
      for (std::int64_t count = 0; count <= kMost; ++count) {
        std::vector<std::uint16_t> bits(start + count);  // ends with the run, for AddressSanitizer
        for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(0x3000 + 37 * i);
        std::vector<float> values(start + count + 1, -1.0f);
        kernels().decode({bits.data(), 1, start + count, start + count, format}, 0, start, count,
                         values.data() + start);
        for (std::int64_t i = 0; i < count; ++i)
          ASSERT_EQ(values[start + i], float_format(format).decode(bits[start + i]));
        ASSERT_EQ(values.back(), -1.0f);

        std::vector<std::uint16_t> again(start + count + 1, kUntouched);
        kernels().encode(values.data() + start, count, format, again.data() + start);
        for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(again[start + i], bits[start + i]);
        for (std::int64_t i = 0; i < start; ++i) ASSERT_EQ(again[i], kUntouched);
        ASSERT_EQ(again.back(), kUntouched);
      }
    }
  }
}

// Packing reads parts of rows: any start, odd ones and ones inside a block too, any length, at any row. Or single
// columns.
TEST_P(FormatTest, DecodesAnyPartOfAQuantizedRow) {
  Random random(2);
  const auto check = [&](const auto& weight) {
    const Dense expected = weight.values();
    std::vector<std::int64_t> columns;
    for (std::int64_t col = 0; col < expected.cols; col += 1 + col % 3) columns.push_back(col);
    for (std::int64_t row = 0; row < expected.rows; ++row) {
      std::vector<float> apart(columns.size() + 1, -9.0f);
      kernels().decode_columns(weight.view(), row, columns.data(), std::ssize(columns), apart.data());
      for (std::size_t i = 0; i < columns.size(); ++i) ASSERT_EQ(apart[i], expected(row, columns[i])) << row;
      ASSERT_EQ(apart.back(), -9.0f);
      for (std::int64_t col = 0; col < expected.cols; ++col) {
        const std::int64_t most = expected.cols - col;
        for (const std::int64_t count :
             {std::int64_t{0}, std::int64_t{1}, std::min<std::int64_t>(most, 33), most / 2, most}) {
          std::vector<float> out(count + 1, -9.0f);
          kernels().decode(weight.view(), row, col, count, out.data());
          for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(out[i], expected(row, col + i)) << row << ", " << col + i;
          ASSERT_EQ(out[count], -9.0f);
        }
      }
    }
  };
  for (const std::int64_t cols : {1, 37, 150}) {
    for (const bool nested : {false, true}) check(StoredLevels(random, Format::nf4, 5, cols, 32, nested));
    for (const Format levels : {Format::mxfp4, Format::nvfp4, Format::int4}) {
      for (const int blocksize : {16, 32, 128}) check(StoredLevels(random, levels, 5, cols, blocksize, false));
    }
    for (const ScaleKind kind : {ScaleKind::f32, ScaleKind::bf16, ScaleKind::e8m0}) {
      for (const auto& [height, width] : {std::pair{1, 32}, {3, 128}, {2, 17}}) {
        check(StoredFp8(random, 5, cols, height, width, kind));
      }
    }
    check(StoredInt8(random, 5, cols));
  }
}

PISSA_EVERY_ISA(FormatTest);

}  // namespace
}  // namespace pissa::test
