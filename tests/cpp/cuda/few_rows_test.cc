// The CUDA kernels for few rows, on operands as aligned as they need: the fused one for a quantised weight, and the one
// for dense matrices, which share columns among a warp or a block.
#include "pissa/cuda/few_rows.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <deque>
#include <tuple>
#include <vector>

#include "support/backend_test.h"
#include "support/gemm_case.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

Stored aligned(const Dense& values, Format format) {
  return Stored(values, format, Stored::kAligned - values.cols % Stored::kAligned, Stored::kAligned);
}

class FewRowsTest : public BackendTest {
 protected:
  static std::vector<std::int64_t> some_ranks(Random& random) {
    std::vector<std::int64_t> ranks(random.below(3));
    for (std::int64_t& r : ranks) r = 1 + random.below(20);
    return ranks;
  }

  // Of W: for a block of 16 of them, or for blocks of 32, which these would fill twice.
  static std::int64_t some_columns(Random& random) { return random.coin() ? 21 : 16 * cuda::multiprocessors(0) + 5; }

  // y [m, n] = x W^T + tail + bias, W [n, k] quantised; x in half precision, which the tail's factors are rounded to.
  template <class Weight>
  void check(Random& random, std::int64_t m, const Weight& weight, Format format,
             const std::vector<std::int64_t>& ranks, bool with_bias) const {
    const std::int64_t n = weight.view().rows, k = weight.view().cols;
    SCOPED_TRACE(::testing::Message() << m << ", " << n << ", " << k << ", x " << name(format) << ", weight "
                                      << name(weight.view().format) << ", blocksize " << weight.view().scales.blocksize
                                      << ", tail " << ::testing::PrintToString(ranks));
    const Precision precision = format == Format::bf16 ? Precision::bf16 : Precision::f16;
    const FloatFormat half = float_format(format);
    const Stored x = aligned(random.dense(m, k), format);
    ASSERT_TRUE(cuda::few_rows_quantized_fits(x.view(), weight.view(), {})) << "this is not about another kernel";
    const Dense w = rounded_to(half, weight.values());
    Bounded expected{x.values() * transposed(w), absolute(x.values()) * absolute(transposed(w))};
    std::int64_t roundings = k + 4;
    std::deque<Operand> operands;
    std::vector<Term> tail;
    for (const std::int64_t r : ranks) {
      const auto factor = [&](std::int64_t rows) -> const Operand& {
        if (random.coin()) return operands.emplace_back(aligned(random.dense(rows, r), Format::f32));
        return operands.emplace_back(random, rows, r, static_cast<Form>(random.pick(kFloatFormats)));
      };
      const Operand& a = factor(m);
      const Operand& b = factor(n);
      tail.push_back({a.view(), Op::n, b.view(), Op::t, 0.5f, precision});
      const Dense a_values = rounded_to(half, 0.5 * a.values()), b_values = rounded_to(half, b.values());
      const Bounded product{a_values * transposed(b_values), absolute(a_values) * absolute(transposed(b_values))};
      expected = {expected.value + product.value, expected.magnitude + product.magnitude};
      roundings += r + 1;
    }
    const Operand bias(random, 1, n, static_cast<Form>(format));
    if (with_bias) expected = {expected.value + bias.values(), expected.magnitude + absolute(bias.values())};
    for (const Format out : {format, Format::f32}) {
      Stored y = Stored::poisoned(m, n, out, random.below(4));
      backend().weight_gemm_nt(x.view(), weight.view(), 1.0f, precision, tail, with_bias ? bias.view() : Matrix{},
                               y.mutable_view());
      expect_close(y, expected, roundings);
    }
  }
};

TEST_P(FewRowsTest, EveryNumberOfRows) {
  Random random(1);
  for (std::int64_t m = 1; m <= 64; m += m < 18 ? 1 : 1 + random.below(4)) {
    for (const Format format : {Format::bf16, Format::f16}) {
      const StoredLevels nf4(random, Format::nf4, some_columns(random), 160, random.pick({32, 64, 128}), random.coin());
      check(random, m, nf4, format, some_ranks(random), random.coin());
      for (const auto& [levels, blocksize] :
           {std::pair{Format::mxfp4, 32}, {Format::nvfp4, 16}, {Format::int4, 32}, {Format::int4, 128}}) {
        const StoredLevels weight(random, levels, some_columns(random), 160, blocksize, false);
        check(random, m, weight, format, some_ranks(random), random.coin());
      }
      check(random, m, StoredInt8(random, some_columns(random), 160), format, some_ranks(random), random.coin());
      for (const auto& [height, width] : {std::pair{1, 32}, {1, 160}, {5, 96}}) {
        const StoredFp8 weight(random, some_columns(random), 160, height, width,
                               random.pick({ScaleKind::f32, ScaleKind::bf16, ScaleKind::e8m0}));
        check(random, m, weight, format, some_ranks(random), random.coin());
      }
    }
  }
}

// Chunks of 128, eight warps, blocks of 16 and 32 columns: their edges. NF4 blocks that cross rows.
TEST_P(FewRowsTest, EveryEdge) {
  Random random(2);
  for (const std::int64_t k : {32, 64, 96, 128, 160, 992, 1024, 1056, 2144}) {
    check(random, 3, StoredNf4(random, 17, k, random.pick({32, 64, 256}), random.coin()), Format::bf16, {9}, true);
    check(random, 3, StoredInt8(random, 17, k), Format::bf16, {9}, true);
  }
  for (const std::int64_t n : {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65}) {
    check(random, 16, StoredNf4(random, n, 96, 64, random.coin()), Format::f16, {9, 17}, false);
    check(random, 16, StoredInt8(random, n, 96), Format::f16, {9, 17}, false);
  }
  check(random, 5, StoredNf4(random, 40, 288, 4096, true), Format::bf16, {9}, true);
}

// Chunks of 32 of the tail, eight warps, one after the other through both terms; K that leaves some warps without a
// chunk of the weight.
TEST_P(FewRowsTest, EveryRank) {
  Random random(6);
  for (const std::int64_t r : {1, 7, 8, 16, 31, 32, 33, 64, 128, 255, 256, 257, 300}) {
    for (const std::int64_t m : {1, 9, 16, 32, 64}) {
      check(random, m, StoredNf4(random, some_columns(random), 96, 64, random.coin()), Format::bf16, {r},
            random.coin());
      check(random, m, StoredInt8(random, some_columns(random), 96), Format::f16, {r, 1 + random.below(100)},
            random.coin());
    }
  }
}

TEST_P(FewRowsTest, TheSameBitsWithATail) {
  Random random(7);
  const Stored x = aligned(random.dense(16, 1056), Format::bf16);
  const StoredNf4 weight(random, 33, 1056, 64, true);
  const Operand a(random, 16, 90, Form::f32), b(random, 33, 90, Form::f32);
  const Term tail[] = {{a.view(), Op::n, b.view(), Op::t, 0.5f, Precision::bf16}};
  ASSERT_TRUE(cuda::few_rows_quantized_fits(x.view(), weight.view(), tail));
  expect_same_bits([&](auto& cuda) {
    Stored y = Stored::poisoned(16, 33, Format::f32);
    cuda.weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::bf16, tail, {}, y.mutable_view());
    return y.bytes();
  });
}

// Codes beyond the columns of a chunk are nobody's, and so are their scales, which f16 may not hold.
TEST_P(FewRowsTest, NestedScalesThatF16CannotHoldDoNotCountBeyondTheColumns) {
  const std::vector<std::uint8_t> codes(16, 0x77), absmax8{127};  // of zeros, in the middle of the map
  const float nested_absmax = 1.0f, offset = 1e5f;
  Matrix weight{codes.data(), 1, 32, 0, Format::nf4};
  weight.scales = {32, nullptr, absmax8.data(), &nested_absmax, &offset};
  Random random(8);
  const Stored x = aligned(random.dense(1, 32), Format::f16);
  ASSERT_TRUE(cuda::few_rows_quantized_fits(x.view(), weight, {}));
  Stored y = Stored::poisoned(1, 1, Format::f32);
  backend().weight_gemm_nt(x.view(), weight, 1.0f, Precision::f16, {}, {}, y.mutable_view());
  EXPECT_EQ(y.values()(0, 0), 0.0);
}

TEST_P(FewRowsTest, DenseOperandsOfEveryLengthAndAlignment) {
  Random random(3);
  for (const std::int64_t k : {1, 7, 8, 9, 255, 256, 257, 1023, 1024, 1025, 2048, 3001}) {
    for (const std::int64_t m : {1, 4, 5, 13, 16}) {
      const std::int64_t n = 1 + random.below(20);
      const Format a_format = random.pick(kFloatFormats), b_format = random.pick(kFloatFormats),
                   out_format = random.pick(kFloatFormats);
      SCOPED_TRACE(::testing::Message() << m << ", " << n << ", " << k << ", " << name(a_format) << ", "
                                        << name(b_format) << " to " << name(out_format));
      const Stored a = random.coin() ? aligned(random.dense(m, k), a_format) : Stored(random.dense(m, k), a_format);
      const Stored b = random.coin() ? aligned(random.dense(n, k), b_format) : Stored(random.dense(n, k), b_format);
      const Stored addend(random.dense(m, n), random.pick(kFloatFormats));
      const Term terms[] = {{a.view(), Op::n, b.view(), Op::t, -0.75f}};
      Stored out = Stored::poisoned(m, n, out_format);
      ASSERT_TRUE(cuda::few_rows_fit(terms, out.mutable_view()));
      backend().gemm(terms, addend.view(), out.mutable_view());
      const Dense b_t = transposed(b.values());
      expect_close(out,
                   {-0.75 * (a.values() * b_t) + addend.values(),
                    0.75 * (absolute(a.values()) * absolute(b_t)) + absolute(addend.values())},
                   k + 4);
    }
  }
}

// Each thing that the kernels cannot take, alone, sends a product another way.
TEST_P(FewRowsTest, WhatTheyCannotTake) {
  alignas(16) static const char memory[32] = {};
  const Term thin{{memory, 16, 3, 3}, Op::n, {memory, 9, 3, 3}, Op::t, 1.0f, Precision::f16};
  const auto fits = [&](auto change) {
    Matrix x{memory, 16, 64, 64, Format::f16}, weight{memory, 9, 64, 64, Format::nf4};
    std::vector<Term> tail{thin, thin};
    change(x, weight, tail);
    return cuda::few_rows_quantized_fits(x, weight, tail);
  };
  EXPECT_TRUE(fits([](auto&...) {}));
  EXPECT_TRUE(fits([](Matrix& x, auto&...) { x.rows = 64; }));
  EXPECT_FALSE(fits([](Matrix& x, auto&...) { x.rows = 65; }));
  EXPECT_FALSE(fits([](Matrix& x, auto&...) { x.format = Format::f32; }));
  EXPECT_FALSE(fits([](Matrix& x, auto&...) { x.ld = 68; }));
  EXPECT_FALSE(fits([](Matrix& x, auto&...) { x.data = memory + 8; }));
  EXPECT_FALSE(fits([](Matrix&, Matrix& weight, auto&) { weight.format = Format::bf16; }));
  EXPECT_FALSE(fits([](Matrix& x, Matrix& weight, auto&) { x.cols = weight.cols = 48; }));
  EXPECT_FALSE(fits([](Matrix&, Matrix& weight, auto&) { weight.data = memory + 8; }));
  for (const auto& [format, blocksize, fit] :
       {std::tuple{Format::fp8, 48, false}, {Format::fp8, 64, true}, {Format::nvfp4, 16, true}}) {
    EXPECT_EQ(
        fits([&](Matrix&, Matrix& weight, auto&) { weight.format = format, weight.scales.blocksize = blocksize; }),
        fit);
  }
  EXPECT_FALSE(fits([](Matrix&, Matrix&, std::vector<Term>& tail) { tail[1].op_b = Op::n; }));
  EXPECT_FALSE(fits([](Matrix&, Matrix&, std::vector<Term>& tail) { tail[1].precision = Precision::f32; }));
  EXPECT_FALSE(fits([](Matrix&, Matrix&, std::vector<Term>& tail) { tail[0].precision = Precision::bf16; }));

  const auto fit = [&](std::int64_t rows, auto change) {
    std::vector<Term> terms{thin, thin};
    change(terms);
    return cuda::few_rows_fit(terms, {nullptr, rows});
  };
  EXPECT_TRUE(fit(16, [](auto&) {}));
  EXPECT_FALSE(fit(17, [](auto&) {}));
  EXPECT_FALSE(fit(16, [&](std::vector<Term>& terms) { terms.push_back(thin); }));
  EXPECT_FALSE(fit(16, [](std::vector<Term>& terms) { terms[1].op_a = Op::t; }));
  EXPECT_FALSE(fit(16, [](std::vector<Term>& terms) { terms[1].op_b = Op::n; }));
  EXPECT_FALSE(fit(16, [](std::vector<Term>& terms) { terms[1].a.format = Format::nf4; }));
  EXPECT_FALSE(fit(16, [](std::vector<Term>& terms) { terms[1].b.format = Format::nf4; }));
}

// What fits the kernel for quantised weights, but asks for what it does not compute.
TEST_P(FewRowsTest, AnotherScaleDirectionOrPrecision) {
  Random random(5);
  const Stored x = aligned(random.dense(5, 64), Format::bf16);
  const StoredNf4 weight(random, 64, 64, 64, false);
  ASSERT_TRUE(cuda::few_rows_quantized_fits(x.view(), weight.view(), {}));
  const Dense exact = weight.values(), rounded = rounded_to(kBf16, exact);
  Stored y = Stored::poisoned(5, 64, Format::f32);
  const auto expect = [&](double scale, const Dense& w) {
    expect_close(y, {scale * (x.values() * w), absolute(x.values()) * absolute(w)}, 64);
  };
  backend().weight_gemm_nt(x.view(), weight.view(), 0.5f, Precision::bf16, {}, {}, y.mutable_view());
  expect(0.5, transposed(rounded));
  backend().weight_gemm_nn(x.view(), weight.view(), 1.0f, Precision::bf16, {}, y.mutable_view());
  expect(1, rounded);
  backend().weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::f32, {}, {}, y.mutable_view());
  expect(1, transposed(exact));
}

TEST_P(FewRowsTest, AnAddendInNf4) {
  Random random(4);
  const Operand a(random, 5, 3, Form::f32), b(random, 40, 3, Form::f32), addend(random, 5, 40, Form::nf4);
  const Term terms[] = {{a.view(), Op::n, b.view(), Op::t}};
  Stored out = Stored::poisoned(5, 40, Format::f32);
  backend().gemm(terms, addend.view(), out.mutable_view());
  const Dense b_t = transposed(b.values());
  expect_close(
      out, {a.values() * b_t + addend.values(), absolute(a.values()) * absolute(b_t) + absolute(addend.values())}, 5);
}

PISSA_EVERY_BACKEND(FewRowsTest);

}  // namespace
}  // namespace pissa::test
