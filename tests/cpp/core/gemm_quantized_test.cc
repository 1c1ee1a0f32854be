// gemm_quantized: subtracting the factors and quantising in one pass gives the codes of doing one after the other.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "pissa/core/four_bits.h"
#include "pissa/core/nf4.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"
#include "support/backend_test.h"
#include "support/gemm_case.h"
#include "support/quantized_result.h"

namespace pissa::test {
namespace {

class GemmQuantizedTest : public BackendTest {};

TEST_P(GemmQuantizedTest, EqualsQuantizingTheStoredResidual) {
  Random random(1);
  struct Shape {
    std::int64_t rows, cols, blocksize;
  };
  for (const auto& [rows, cols, blocksize] :
       {Shape{1, 1, 64}, Shape{1, 1000, 64}, Shape{1000, 1, 64}, Shape{129, 1, 4096}, Shape{5, 7, 32},
        Shape{33, 61, 32}, Shape{64, 64, 256}, Shape{100, 259, 64}, Shape{70, 513, 128}, Shape{37, 299, 4096},
        Shape{3, 2, 4096}, Shape{115, 1088, 64}, Shape{9, 512, 512}, Shape{2, 1024, 1024},
        Shape{230, 61, 4096}}) {  // enough rows for a second task, which starts inside one
    const Form form = static_cast<Form>(random.pick(kFloatFormats));
    SCOPED_TRACE(::testing::Message() << "[" << rows << ", " << cols << "] " << name(form) << ", blocksize "
                                      << blocksize);
    // Where rows lie together at addresses of 16 bytes, a GPU reads them otherwise.
    const Operand weight =
        random.coin() ? Operand(random, rows, cols, form)
                      : Operand(Stored(random.dense(rows, cols), static_cast<Format>(form), 0, Stored::kAligned));
    TermList list(rows, cols);
    list.add(random, 5, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
    if (random.coin()) list.add(random, 3, Form::bf16, Op::n, Form::f32, Op::t, 2.0f);

    std::vector<float> residual(rows * cols, std::nanf(""));
    residual_sum(list.terms(), weight.view(), {residual.data(), rows, cols, cols, Format::f32});
    for (const Format format : kQuantizedFormats) {
      QuantizedResult expected(format, rows, cols, blocksize), result = expected;
      if (!is_blocksize(format, result.blocksize, cols)) continue;
      const QuantOutput out = expected.output();
      cpu::kernels("baseline")
          .quantize(format, residual.data(), rows * cols, out.blocksize, *out.global, out.codes, out.scales);
      backend().gemm_quantized(list.terms(), weight.view(), result.output());
      EXPECT_TRUE(result == expected) << info(format).name;
      EXPECT_TRUE(result.padding_intact()) << info(format).name;
    }
  }
}

// INT8 by its definition: ties between codes, a row whose largest element is negative, rows of zeros and of what is so
// small that its factor overflows, very small and very large ones; rows of codes that start anywhere in a word.
TEST_P(GemmQuantizedTest, AnInt8CodeIsTheRoundedElement) {
  Random random(4);
  for (const std::int64_t cols : {1, 5, 8, 127, 300, 1024}) {
    Dense values(8, cols);
    for (std::int64_t j = 0; j < cols; ++j) {
      const double normal = random.normal();
      values(0, j) = normal;
      values(1, j) = j == 0 ? -127 : static_cast<double>(random.below(254)) - 126.5;
      values(2, j) = j == cols / 2 ? -9 : normal;
      values(3, j) = j % 2 == 0 ? 0.0 : -0.0;
      values(4, j) = 1e-38 * normal;
      values(5, j) = 0x1p-120 * (1 + random.uniform());
      values(6, j) = 1e37 * normal;
      values(7, j) = normal;
    }
    const Stored weight(values, Format::f32);
    const Dense stored = weight.values();
    QuantizedResult result(Format::int8, 8, cols);
    backend().gemm_quantized({}, weight.view(), result.output());
    EXPECT_TRUE(result.padding_intact());
    for (std::int64_t i = 0; i < 8; ++i) {
      float largest = 0;
      for (std::int64_t j = 0; j < cols; ++j) largest = std::max(largest, static_cast<float>(std::fabs(stored(i, j))));
      ASSERT_EQ(result.scales[i], largest) << i;
      const float factor = i == 3 || i == 4 ? 0 : 1 / largest * 127;
      for (std::int64_t j = 0; j < cols; ++j) {
        const float expected = std::nearbyint(static_cast<float>(stored(i, j)) * factor);
        ASSERT_EQ(static_cast<std::int8_t>(result.codes[i * cols + j]), expected) << i << ", " << j << " of " << cols;
      }
    }
  }
}

// The formats of released models by their definitions: the scale of a block, and the code nearest to an element divided
// by it, of two as near the even one. In the first two rows scales are 1 and elements lie on ties and beside them.
TEST_P(GemmQuantizedTest, ACodeIsTheNearestAndOfTiesTheEvenOne) {
  Random random(6);
  constexpr std::int64_t kRows = 9, kCols = 256;
  for (const Format format : {Format::mxfp4, Format::nvfp4, Format::int4, Format::fp8}) {
    SCOPED_TRACE(info(format).name);
    const int codes = format == Format::fp8 ? 127 : format == Format::int4 ? 16 : 8;  // without signs
    const auto number = [&, format = format](int code) {
      if (format == Format::fp8) return kE4m3.decode(static_cast<std::uint32_t>(code));
      return format == Format::int4 ? code - 8.0 : kE2m1.decode(static_cast<std::uint32_t>(code));
    };
    const double most = format == Format::fp8 ? 448 : format == Format::int4 ? 7.5 : 6;
    QuantizedResult result(format, kRows, kCols, 32);
    Dense values = random.dense(kRows, kCols);
    for (std::int64_t j = 0; j < kCols; ++j) {
      const int code = static_cast<int>(random.below(codes - 1));
      const float middle = static_cast<float>((number(code) + number(code + 1)) / 2);
      const float sign = random.coin() ? -1.0f : 1.0f;
      values(0, j) = j % result.blocksize == 0 ? most : sign * middle;
      values(1, j) = j % result.blocksize == 0 ? -most : std::nextafter(sign * middle, random.coin() ? -9.0f : 9.0f);
      values(2, j) = 0.0;
      for (std::int64_t i = 3; i < kRows; ++i) values(i, j) = std::ldexp(values(i, j), static_cast<int>(8 * i - 44));
    }
    const Stored weight(values, Format::f32);
    values = weight.values();
    backend().gemm_quantized({}, weight.view(), result.output());
    EXPECT_TRUE(result.padding_intact());
    for (std::int64_t i = 0; i < kRows; ++i) {
      for (std::int64_t j = 0; j < kCols; ++j) {
        const std::int64_t at = i * kCols + j, first = at - at % result.blocksize;
        float largest = 0;
        for (std::int64_t k = first; k < first + result.blocksize; ++k) {
          largest = std::max(largest, static_cast<float>(std::fabs(values.values[k])));
        }
        double scale = largest / static_cast<float>(most);
        if (format == Format::mxfp4) {  // up from 7/4 of a power of two on
          const int exponent = largest > 0 ? std::ilogb(largest) : -150;
          const bool up = std::ldexp(largest, -exponent) >= 1.75;
          scale = std::ldexp(1.0, std::max(exponent + up - 2, -127));
        } else if (format == Format::nvfp4) {
          const float scaled = result.global * (largest / 6);
          double least = 0;
          for (std::uint32_t code = 0; code < 127; ++code) {
            const double found = kE4m3.decode(code), gap = std::fabs(found - scaled) - std::fabs(least - scaled);
            if (gap < 0 || (gap == 0 && code % 2 == 0)) least = found;
          }
          scale = static_cast<float>(least) / result.global;
        } else if (format == Format::int4) {
          scale = kBf16.decode(kBf16.encode(scale));
        }
        ASSERT_EQ(result.scales[first / result.blocksize], scale) << i << ", " << j;
        const float value = static_cast<float>(values.values[at]);
        const float scaled = scale < 1e-38 ? 0 : value / static_cast<float>(scale);
        int best = 0;
        const double size = format == Format::int4 ? scaled : std::fabs(scaled);
        for (int code = 1; code < codes; ++code) {
          const double gap = std::fabs(number(code) - size) - std::fabs(number(best) - size);
          if (gap < 0 || (gap == 0 && code % 2 == 0)) best = code;
        }
        if (format != Format::int4 && std::signbit(scaled)) best += format == Format::fp8 ? 128 : 8;
        const int code = format == Format::fp8 ? result.codes[at] : result.codes[at / 2] >> at % 2 * 4 & 15;
        ASSERT_EQ(code, best) << i << ", " << j << ": " << scaled;
      }
    }
  }
}

// Beside a tie, where a product with 1 / scale makes another code.
TEST_P(GemmQuantizedTest, AnElementIsDividedByAScale) {
  Random random(7);
  constexpr std::int64_t kCols = 64;
  for (const Format format : {Format::nvfp4, Format::int4, Format::fp8}) {
    QuantizedResult result(format, 1, kCols);
    const auto scale_of = [&](float largest) {
      if (format == Format::fp8) return e4m3_scale(largest);
      return format == Format::int4 ? FourBits<Format::int4>::scale(largest, 1.0f)
                                    : FourBits<Format::nvfp4>::scale(largest, result.global);
    };
    const auto code_of = [&](float scaled) -> int {
      if (format == Format::fp8) return e4m3_code(scaled);
      return format == Format::int4 ? FourBits<Format::int4>::code(scaled) : e2m1_code(scaled);
    };
    const auto number = [&](int code) {
      if (format == Format::fp8) return e4m3_value(static_cast<std::uint8_t>(code));
      return format == Format::int4 ? FourBits<Format::int4>::kLevels[code] : kE2m1Levels[code];
    };
    for (int trial = 0; trial < 20; ++trial) {
      float largest = 0, scale = 0;
      std::vector<float> close;
      while (close.empty()) {
        largest = static_cast<float>(0.5 + random.uniform());
        scale = scale_of(largest);
        for (int code = 1; code < (format == Format::fp8 ? 126 : format == Format::int4 ? 15 : 7); ++code) {
          const float middle = (number(code) + number(code + 1)) / 2 * scale;
          for (const float value : {std::nextafter(middle, -9.0f), middle, std::nextafter(middle, 9.0f)}) {
            if (code_of(value * (1.0f / scale)) != code_of(value / scale)) close.push_back(value);
          }
        }
      }
      std::vector<float> values;
      for (std::size_t i = 0; i < kCols; ++i) {
        values.push_back(static_cast<std::int64_t>(i) % result.blocksize == 0 ? largest : close[i % close.size()]);
      }
      backend().gemm_quantized({}, {values.data(), 1, kCols, kCols, Format::f32}, result.output());
      for (std::int64_t i = 0; i < kCols; ++i) {
        ASSERT_EQ(result.scales[i / result.blocksize], scale);
        const int code = format == Format::fp8 ? result.codes[i] : result.codes[i / 2] >> i % 2 * 4 & 15;
        ASSERT_EQ(code, code_of(values[i] / scale)) << info(format).name << ", " << i;
      }
    }
  }
}

// A whole block is multiplied by 1 / absmax, a short last one divided by absmax: elements beside a threshold, where
// that makes different codes. The codes start at an odd address.
TEST_P(GemmQuantizedTest, WholeBlocksAreMultipliedAndTheShortOneIsDivided) {
  Random random(3);
  constexpr std::int64_t kBlock = 64, kCount = 3 * kBlock - 2;
  for (int trial = 0; trial < 20; ++trial) {
    float absmax = 0, factor = 0;
    std::vector<float> close;
    while (close.empty()) {  // there are none where the factor is exact
      absmax = static_cast<float>(0.5 + random.uniform());
      factor = 1.0f / absmax;
      for (const float threshold : kNf4Thresholds.value) {
        for (const float beyond : {-2.0f, 2.0f}) {
          const float value = std::nextafter(threshold * absmax, beyond);
          if (nf4_code(value * factor) != nf4_code(value / absmax)) close.push_back(value);
        }
      }
    }
    std::vector<float> values;
    for (std::size_t i = 0; i < kCount; ++i) values.push_back(i % kBlock == 0 ? absmax : close[i % close.size()]);
    std::vector<std::uint8_t> codes(1 + code_bytes(Format::nf4, kCount));
    std::vector<float> scales(3);
    backend().gemm_quantized({}, {values.data(), 1, kCount, kCount, Format::f32},
                             {Format::nf4, kBlock, codes.data() + 1, scales.data()});
    EXPECT_EQ(scales, std::vector<float>(3, absmax));
    for (std::int64_t i = 0; i < kCount; ++i) {
      const int expected = nf4_code(i < 2 * kBlock ? values[i] * factor : values[i] / absmax);
      ASSERT_EQ((codes[1 + i / 2] >> (i % 2 == 0 ? 4 : 0)) & 15, expected) << i;
    }
  }
}

// In whatever place of a block, short ones too, with and without terms; the other blocks are as they would be without.
TEST_P(GemmQuantizedTest, WhatIsNotFiniteStaysInTheScaleOfItsBlock) {
  Random random(5);
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  constexpr std::int64_t kRows = 3, kCols = 301;
  TermList list(kRows, kCols);
  list.add(random, 2, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
  const std::span<const Term> all = list.terms(), none;
  for (const auto& [format, blocksize] : {std::pair{Format::nf4, 32},
                                          {Format::nf4, 64},
                                          {Format::nf4, 512},
                                          {Format::int8, kCols},
                                          {Format::fp8, kCols}}) {
    for (const std::span<const Term> terms : {none, all}) {
      Dense values = random.dense(kRows, kCols);
      const auto quantize = [&, format = format, blocksize = blocksize](const Dense& dense) {
        const Stored weight(dense, Format::f32, 0, Stored::kAligned);
        QuantizedResult result(format, kRows, kCols, blocksize);
        backend().gemm_quantized(terms, weight.view(), result.output());
        return result;
      };
      const QuantizedResult good = quantize(values);
      for (const std::int64_t at : {0, 7, 8, 63, 64, 255, 256, 301, 511, 512, 700, 901, 902}) {
        for (const float bad : {nan, -nan, infinity, -infinity}) {
          SCOPED_TRACE(::testing::Message() << info(format).name << ", blocksize " << blocksize << ", " << terms.size()
                                            << " terms, " << bad << " at " << at);
          const double before = std::exchange(values.values[at], bad);
          const QuantizedResult result = quantize(values);
          values.values[at] = before;
          EXPECT_TRUE(result.padding_intact());
          const std::int64_t block = at / blocksize;
          for (std::size_t i = 0; i < result.scales.size(); ++i) {
            if (static_cast<std::int64_t>(i) != block) {
              ASSERT_EQ(result.scales[i], good.scales[i]) << i;
            } else if (std::isnan(bad)) {
              ASSERT_TRUE(std::isnan(result.scales[i]));
            } else {
              ASSERT_EQ(result.scales[i], infinity);
            }
          }
          const auto byte = [&, format = format](std::int64_t element) { return code_bytes(format, element); };
          const std::int64_t end = std::min((block + 1) * blocksize, kRows * kCols);
          for (std::int64_t i = 0; i < byte(kRows * kCols); ++i) {
            if (i < byte(block * blocksize) || i >= byte(end)) {
              ASSERT_EQ(result.codes[i], good.codes[i]) << i;
            }
          }
        }
      }
    }
  }
}

TEST_P(GemmQuantizedTest, TheSameBits) {
  Random random(2);
  for (const auto& [format, blocksize] :
       {std::pair{Format::nf4, 32}, {Format::nf4, 4096}, {Format::int8, 61}, {Format::fp8, 61}}) {
    const Stored weight(random.dense(230, 61), Format::bf16);
    TermList list(230, 61);
    list.add(random, 5, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
    expect_same_bits([&, format = format, blocksize = blocksize](auto& cpu) {
      QuantizedResult result(format, 230, 61, blocksize);
      cpu.gemm_quantized(list.terms(), weight.view(), result.output());
      return result;
    });
  }
}

PISSA_EVERY_BACKEND(GemmQuantizedTest);

}  // namespace
}  // namespace pissa::test
