// Blocks of GGUF files: elements, and products that read a weight of them.
#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <vector>

#include "pissa/core/quantized.h"
#include "support/backend_test.h"
#include "support/gemm_case.h"

namespace pissa::test {
namespace {

class GgufTest : public BackendTest {};

TEST_P(GgufTest, ElementsAreExact) {
  Random random(1);
  for (const Form form : gguf_forms()) {
    SCOPED_TRACE(name(form));
    const Operand a(random, 67, 768, form);
    Stored out = Stored::poisoned(67, 768, Format::f32);
    backend().copy(a.view(), out.mutable_view());
    EXPECT_EQ(out.values().values, a.values().values);
    EXPECT_TRUE(out.padding_intact());
    const Matrix part = separate_rows(a.view(), 66, 1);
    Stored row = Stored::poisoned(1, 768, Format::f32);
    backend().copy(part, row.mutable_view());
    const Dense values = a.values();
    EXPECT_EQ(row.values().values, std::vector<double>(values.values.end() - 768, values.values.end()));
  }
}

// What no ordinary block has: the smallest scales, Inf and NaN. A product with 0 is then NaN on both sides.
TEST_P(GgufTest, EveryScaleOfMxfp4) {
  std::vector<std::uint8_t> blocks(256 * 17);
  for (int byte = 0; byte < 256; ++byte) {
    blocks[byte * 17] = static_cast<std::uint8_t>(byte);
    for (int i = 1; i < 17; ++i) blocks[byte * 17 + i] = static_cast<std::uint8_t>(i * 31);
  }
  Matrix matrix{blocks.data(), 256, 32, 0, Format::mxfp4_gguf};
  matrix.scales.blocksize = 32;
  Stored out = Stored::poisoned(256, 32, Format::f32);
  backend().copy(matrix, out.mutable_view());
  const Dense actual = out.values();
  for (int byte = 0; byte < 256; ++byte) {
    for (int i = 0; i < 32; ++i) {
      const auto expected = static_cast<float>(gguf_element(Format::mxfp4_gguf, &blocks[byte * 17], i));
      EXPECT_EQ(actual(byte, i), expected) << byte << ", " << i;
    }
  }
}

// Few and many rows; slices of the inner dimension that begin inside a block; rows longer than a slice; odd columns.
TEST_P(GgufTest, Products) {
  Random random(2);
  const auto check = [&](Form form, Op op, const Size& size, Precision precision) {
    const auto& [m, n, k] = size;
    SCOPED_TRACE(::testing::Message() << name(form) << (op == Op::t ? " nt " : " nn ") << m << ", " << n << ", " << k
                                      << ", " << static_cast<int>(precision));
    TermList list(m, n, precision, rounds(precision));
    list.add(random, k, random.pick({Form::f32, Form::bf16}), Op::n, form, op, list.random_scale(random));
    list.add(random, 3, Form::f32, Op::n, Form::f32, op, 1.0f);
    const auto& [a, op_a, b, op_b, scale, its_precision] = list.terms().front();
    const auto rest = std::span(list.terms()).subspan(1);
    const Format out_format = random.pick(kFloatFormats);
    Stored out = Stored::poisoned(m, n, out_format);
    if (op == Op::t) backend().weight_gemm_nt(a, b, scale, its_precision, rest, {}, out.mutable_view());
    else backend().weight_gemm_nn(a, b, scale, its_precision, rest, out.mutable_view());
    const std::int64_t few_rows = op == Op::t ? list.bf16_roundings() : 0;
    expect_close(out, list.expected(), list.roundings(), few_rows + intermediate_roundings(out_format));
  };
  for (const Form form : gguf_forms()) {
    for (const Precision precision : {Precision::f32, Precision::bf16, Precision::f16}) {
      for (const std::int64_t m : {1, 2, 3, 4, 5, 9, 17}) check(form, Op::t, {m, 35, 1280}, precision);
      for (const std::int64_t m : {1, 5, 17}) check(form, Op::n, {m, 768, 37}, precision);
    }
    check(form, Op::t, {2, 3, 16384 + 512}, Precision::f32);
  }
}

PISSA_EVERY_BACKEND(GgufTest);

}  // namespace
}  // namespace pissa::test
