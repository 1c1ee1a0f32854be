// gemm_quantized: subtracting the factors and quantising in one pass gives the codes of doing one after the other.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "pissa/core/nf4.h"
#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"
#include "support/backend_test.h"
#include "support/gemm_case.h"

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
    const Operand weight(random, rows, cols, form);
    TermList list(rows, cols);
    list.add(random, 5, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
    if (random.coin()) list.add(random, 3, Form::bf16, Op::n, Form::f32, Op::t, 2.0f);

    std::vector<float> residual(rows * cols, std::nanf(""));
    residual_sum(list.terms(), weight.view(), {residual.data(), rows, cols, cols, Format::f32});
    std::vector<std::uint8_t> expected_codes(code_bytes(Format::nf4, rows * cols));
    std::vector<float> expected_absmax(ceil_div(rows * cols, blocksize));
    cpu::kernels("baseline")
        .quantize(Format::nf4, residual.data(), rows * cols, blocksize, expected_codes.data(), expected_absmax.data());

    std::vector<std::uint8_t> codes(expected_codes.size() + 1, 0xee);
    std::vector<float> absmax(expected_absmax.size() + 1, std::nanf(""));
    backend().gemm_quantized(list.terms(), weight.view(), {Format::nf4, blocksize, codes.data(), absmax.data()});
    EXPECT_EQ(codes.back(), 0xee);
    EXPECT_TRUE(std::isnan(absmax.back()));
    codes.pop_back();
    absmax.pop_back();
    EXPECT_TRUE(codes == expected_codes);
    EXPECT_TRUE(absmax == expected_absmax);
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

TEST_P(GemmQuantizedTest, TheSameBits) {
  Random random(2);
  for (const std::int64_t blocksize : {32, 4096}) {
    const Stored weight(random.dense(230, 61), Format::bf16);
    TermList list(230, 61);
    list.add(random, 5, Form::f32, Op::n, Form::f32, Op::n, -0.3f);
    expect_same_bits([&](auto& cpu) {
      std::vector<std::uint8_t> codes(code_bytes(Format::nf4, 230 * 61));
      std::vector<float> absmax(ceil_div(230 * 61, blocksize));
      cpu.gemm_quantized(list.terms(), weight.view(), {Format::nf4, blocksize, codes.data(), absmax.data()});
      return std::pair(codes, absmax);
    });
  }
}

PISSA_EVERY_BACKEND(GemmQuantizedTest);

}  // namespace
}  // namespace pissa::test
