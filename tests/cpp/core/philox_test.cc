#include "pissa/core/philox.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

// Known answers of Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, 0), (PhiloxBlock{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, 0xffffffffffffffff),
            (PhiloxBlock{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // Key words a4093822 and 299f31d0, the first one low.
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, 0x299f31d0a4093822),
            (PhiloxBlock{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, SignBlocksCountInTheLowWords) {
  const std::uint64_t block = 0x123456789abcdef0;
  EXPECT_EQ(philox_signs(block, 7), philox4x32({0x9abcdef0, 0x12345678, 0, 0}, 7));
}

double expected_sign(std::int64_t index, std::uint64_t seed) {
  const PhiloxBlock bits = philox4x32({static_cast<std::uint32_t>(index / 128), 0, 0, 0}, seed);
  const std::int64_t bit = index % 128;
  return (bits[bit / 32] >> (bit % 32)) & 1 ? -1.0 : 1.0;
}

class FillSignsTest : public BackendTest {};

TEST_P(FillSignsTest, EveryElementIsItsOwnBitForAnyShape) {
  for (const auto& [rows, cols] : {std::pair{1, 1}, {3, 127}, {5, 128}, {4, 129}, {7, 200}, {2, 1000}, {300, 1}}) {
    for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{0xfedcba9876543210}}) {
      Stored signs = Stored::poisoned(rows, cols, Format::f32);
      backend().fill_signs(signs.mutable_view(), seed, 0.25f);
      const Dense values = signs.values();
      for (std::int64_t i = 0; i < rows * cols; ++i) ASSERT_EQ(values.values[i], 0.25 * expected_sign(i, seed)) << i;
      EXPECT_TRUE(signs.padding_intact());
    }
  }
}

TEST_P(FillSignsTest, TheSameBits) {
  expect_same_bits([](auto& cpu) {
    Stored signs = Stored::poisoned(1100, 1000, Format::f32);
    cpu.fill_signs(signs.mutable_view(), 5, 1.0f);
    return signs.bytes();
  });
}

PISSA_EVERY_BACKEND(FillSignsTest);

}  // namespace
}  // namespace pissa::test
