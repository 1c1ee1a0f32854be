// NF4 against bitsandbytes 0.50, bit for bit: golden/nf4.bin, written by golden/make_nf4.py.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

enum Fill : std::int32_t { kNoise, kZeros, kZeroBlocks, kTiny, kOneSize };

struct Golden {
  std::int32_t rows, cols, blocksize, format, fill, nested, seed;
  std::vector<std::uint8_t> codes;
  std::vector<float> absmax;          // not nested
  std::vector<std::uint8_t> absmax8;  // nested
  std::vector<float> nested_absmax;
  float offset = 0;

  std::int64_t elements() const { return std::int64_t{rows} * cols; }
  std::int64_t blocks() const { return ceil_div(elements(), blocksize); }
};

std::vector<Golden> read_golden() {
  std::ifstream file(PISSA_GOLDEN_DIR "/nf4.bin", std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::size_t at = 0;
  const auto read = [&](void* to, std::size_t count) {
    ASSERT_LE(at + count, bytes.size()) << "nf4.bin is cut short";
    std::memcpy(to, bytes.data() + at, count);
    at += count;
  };
  const auto read_vector = [&](auto& vector, std::int64_t count) {
    vector.resize(count);
    read(vector.data(), vector.size() * sizeof vector[0]);
  };
  std::vector<Golden> cases;
  while (at < bytes.size() && !::testing::Test::HasFailure()) {
    Golden& golden = cases.emplace_back();
    read(&golden, 7 * sizeof(std::int32_t));
    read_vector(golden.codes, code_bytes(Format::nf4, golden.elements()));
    if (!golden.nested) {
      read_vector(golden.absmax, golden.blocks());
    } else {
      read_vector(golden.absmax8, golden.blocks());
      read_vector(golden.nested_absmax, ceil_div(golden.blocks(), 256));
      read(&golden.offset, sizeof golden.offset);
    }
  }
  return cases;
}

// As make_nf4.py computes it.
Stored source_of(const Golden& golden) {
  Dense values(golden.rows, golden.cols);
  for (std::uint32_t i = 0; i < golden.elements(); ++i) {
    std::uint32_t h = i * 2654435761u + static_cast<std::uint32_t>(golden.seed) * 40503u;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    const float u = static_cast<float>(h >> 8) * 0x1p-23f - 1.0f;
    float value = u * u * u;
    if (golden.fill == kZeros) value = 0.0f;
    if (golden.fill == kZeroBlocks && i / static_cast<std::uint32_t>(golden.blocksize) % 3 == 1) value = 0.0f;
    if (golden.fill == kTiny) value *= 0x1p-126f;
    if (golden.fill == kOneSize) value = u < 0 ? -0.75f : 0.75f;
    values.values[i] = value;
  }
  return Stored(values, static_cast<Format>(golden.format));
}

class Nf4GoldenTest : public BackendTest {};

// Codes, absmax, codes of absmax and their scales; absmax of the nested cases is checked through the latter.
TEST_P(Nf4GoldenTest, QuantizesAsBitsandbytes) {
  const std::vector<Golden> cases = read_golden();
  ASSERT_EQ(cases.size(), 43u) << "nf4.bin and this test belong together";
  for (const Golden& golden : cases) {
    SCOPED_TRACE(::testing::Message() << "[" << golden.rows << ", " << golden.cols << "] blocksize " << golden.blocksize
                                      << ", " << name(static_cast<Format>(golden.format)) << ", fill " << golden.fill
                                      << ", nested " << golden.nested);
    const Stored weight = source_of(golden);
    std::vector<std::uint8_t> codes(golden.codes.size(), 0xee);
    std::vector<float> absmax(golden.blocks(), std::nanf(""));
    backend().gemm_quantized({}, weight.view(), {Format::nf4, golden.blocksize, codes.data(), absmax.data()});
    EXPECT_TRUE(codes == golden.codes);
    if (!golden.nested) {
      EXPECT_TRUE(absmax == golden.absmax);
      continue;
    }
    std::vector<std::uint8_t> absmax8(golden.blocks(), 0xee);
    std::vector<float> nested_absmax(golden.nested_absmax.size(), std::nanf(""));
    float offset = std::nanf("");
    backend().quantize_absmax(absmax.data(), golden.blocks(), &golden.offset, absmax8.data(), nested_absmax.data(),
                              &offset);
    EXPECT_TRUE(absmax8 == golden.absmax8);
    EXPECT_TRUE(nested_absmax == golden.nested_absmax);
    EXPECT_EQ(offset, golden.offset);
  }
}

PISSA_EVERY_BACKEND(Nf4GoldenTest);

}  // namespace
}  // namespace pissa::test
