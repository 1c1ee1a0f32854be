// weight_gemm_nt and weight_gemm_nn: the products that read a weight, with their low-rank tail and bias.
#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <vector>

#include "support/backend_test.h"
#include "support/gemm_case.h"

namespace pissa::test {
namespace {

class WeightGemmTest : public BackendTest {
 protected:
  // y [m, n] = scale x W^T + tail + bias, W [n, k]; or, with Op::n, dx [m, n] = scale dy W + tail, W [k, n].
  void check(Random& random, Op op, const Size& size, Form x, Form weight, std::int64_t tail, bool with_bias,
             Format out_format) const {
    const auto& [m, n, k] = size;
    SCOPED_TRACE(::testing::Message() << (op == Op::t ? "nt " : "nn ") << m << ", " << n << ", " << k << ", x "
                                      << name(x) << ", weight " << name(weight) << ", tail " << tail << ", bias "
                                      << with_bias << ", out " << name(out_format));
    const Precision precision = random.pick({Precision::f32, Precision::bf16, Precision::f16});
    TermList list(m, n, precision, rounds(precision));
    list.add(random, k, x, Op::n, weight, op, list.random_scale(random));
    for (std::int64_t i = 0; i < tail; ++i) {
      list.add(random, 1 + random.below(5), Form::f32, Op::n, Form::f32, op, list.random_scale(random));
    }
    const Operand bias(random, 1, n, static_cast<Form>(random.pick(kFloatFormats)));
    if (with_bias) list.add_expected(bounded(bias.values()));
    const auto& [a, op_a, b, op_b, scale, its_precision] = list.terms().front();
    const auto rest = std::span(list.terms()).subspan(1);
    Stored out = Stored::poisoned(m, n, out_format, random.below(4));
    if (op == Op::t) {
      backend().weight_gemm_nt(a, b, scale, its_precision, rest, with_bias ? bias.view() : Matrix{},
                               out.mutable_view());
    } else {
      backend().weight_gemm_nn(a, b, scale, its_precision, rest, out.mutable_view());
    }
    const std::int64_t few_rows = op == Op::t ? list.bf16_roundings() : 0;
    expect_close(out, list.expected(), list.roundings(), few_rows + intermediate_roundings(out_format));
  }
};

TEST_P(WeightGemmTest, EveryFormatTailAndBias) {
  Random random(1);
  for (const Form x : {Form::f32, Form::bf16, Form::f16}) {
    for (const Form weight : kForms) {
      for (std::int64_t tail = 0; tail <= 2; ++tail) {
        for (const bool bias : {false, true}) {
          check(random, Op::t, {9, 37, 45}, x, weight, tail, bias, static_cast<Format>(x));
        }
        check(random, Op::n, {9, 37, 45}, x, weight, tail, false, static_cast<Format>(x));
      }
    }
  }
}

TEST_P(WeightGemmTest, EverySize) {
  Random random(2);
  for (const Size& size : edge_sizes()) {
    const Form x = static_cast<Form>(random.pick(kFloatFormats));
    for (const Op op : {Op::t, Op::n}) {
      const bool bias = op == Op::t && random.coin();
      check(random, op, size, x, random.pick(kForms), random.below(3), bias, random.pick(kFloatFormats));
    }
  }
}

// Few rows meet a quantised weight without a panel: every number of them, rows of the weight that start anywhere in a
// block or a byte, a weight that ends inside a chunk, more columns than x has room for at once.
TEST_P(WeightGemmTest, FewRowsOfAQuantizedWeight) {
  Random random(4);
  for (const std::int64_t k : {1, 21, 31, 32, 63, 64, 65, 127, 128, 129, 200, 1000, 17001}) {
    for (std::int64_t m = 1; m <= 17; m += k > 1000 ? 8 : 1) {
      const Form x = static_cast<Form>(random.pick(kFloatFormats));
      for (const Form weight : {random.pick({Form::nf4, Form::nf4_nested}), Form::int8}) {
        check(random, Op::t, {m, 5, k}, x, weight, random.below(3), random.coin(), random.pick(kFloatFormats));
      }
    }
  }
}

// Rows of whole blocks, in panels that start in the middle of a block or at its beginning.
TEST_P(WeightGemmTest, RowsOfWholeBlocks) {
  Random random(5);
  for (const Form weight : kForms) {
    for (const std::int64_t k : {128, 576, 640}) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        check(random, Op::t, {18, 37, k}, random.pick({Form::f32, Form::bf16}), weight, 1, false, Format::f32);
      }
    }
  }
}

#if !defined(PISSA_TEST_CUDA)
// They compute the same sums for 9 rows as for 17; dot products, which round no codes, would compute others.
TEST_P(WeightGemmTest, TileRegistersMultiplyFromNineRowsOn) {
  if (kernels().tile_rows != 32) return;
  Random random(6);
  const Operand x(random, 17, 600, Form::bf16), weight(random, 40, 600, Form::int8);
  const auto first_of = [&](std::int64_t rows) {
    Stored y = Stored::poisoned(rows, 40, Format::f32);
    backend().weight_gemm_nt(rows_of(x.view(), 0, rows), weight.view(), 1.0f, Precision::bf16, {}, {},
                             y.mutable_view());
    const Dense values = y.values();
    return std::vector(values.values.begin(), values.values.begin() + values.cols);
  };
  EXPECT_EQ(first_of(9), first_of(17));
  EXPECT_NE(first_of(8), first_of(17));
}
#endif

// A bias is added before the sum is rounded, however long the sum: 1 + 2^-9 - 1 is 2^-9. Few outputs, so that a device
// divides the sum among its processors.
TEST_P(WeightGemmTest, ABiasIsRoundedWithItsSum) {
  for (const Format format : {Format::bf16, Format::f16}) {
    const double small = format == Format::bf16 ? 0x1p-9 : 0x1p-12;
    const std::int64_t m = 17, n = 32, k = 4096;
    Dense parts(n, k);
    for (std::int64_t j = 0; j < n; ++j) parts(j, 0) = 1, parts(j, k - 1) = small;
    const Stored x(Dense(m, k, 1), format), weight(parts, format), bias(Dense(1, n, -1), format, 0, Stored::kAligned);
    Stored y = Stored::poisoned(m, n, format);
    backend().weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::f32, {}, bias.view(), y.mutable_view());
    EXPECT_EQ(y.values().values, Dense(m, n, small).values) << name(format);
  }
}

TEST_P(WeightGemmTest, TheSameBits) {
  Random random(3);
  const std::int64_t m = 29, out = 517, in = 270, r = 6;
  const Operand x(random, m, in, Form::bf16);
  const Operand dy(random, m, out, Form::bf16);
  const Operand weight(random, out, in, Form::nf4_nested);
  const Operand xa(random, m, r, Form::f32);
  const Operand b(random, out, r, Form::f32);
  const Operand a(random, r, in, Form::f32);
  const Operand bias(random, 1, out, Form::bf16);
  const Term tail_nt[] = {{xa.view(), Op::n, b.view(), Op::t, 2.0f}};
  const Term tail_nn[] = {{xa.view(), Op::n, a.view(), Op::n, 2.0f}};
  expect_same_bits([&](auto& cpu) {
    Stored y = Stored::poisoned(m, out, Format::bf16);
    cpu.weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::f32, tail_nt, bias.view(), y.mutable_view());
    return y.bytes();
  });
  const Operand few(random, 9, 2 * in, Form::bf16);
  const Operand codes(random, out, 2 * in, Form::int8);
  expect_same_bits([&](auto& cpu) {
    Stored y = Stored::poisoned(9, out, Format::f32);
    cpu.weight_gemm_nt(few.view(), codes.view(), 1.0f, Precision::bf16, {}, {}, y.mutable_view());
    return y.bytes();
  });
  expect_same_bits([&](auto& cpu) {
    Stored dx = Stored::poisoned(m, in, Format::f32);
    cpu.weight_gemm_nn(dy.view(), weight.view(), 1.0f, Precision::f32, tail_nn, dx.mutable_view());
    return dx.bytes();
  });
}

PISSA_EVERY_BACKEND(WeightGemmTest);

}  // namespace
}  // namespace pissa::test
