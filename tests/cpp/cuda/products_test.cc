// The CUDA backend's products: operands that are aligned, so that the vector accesses run; a weight in chunks; sums of
// several thin products in half precision, rounded once.
#include "pissa/cuda/products.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "pissa/core/max_abs.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/codes.h"
#include "pissa/cuda/context.h"
#include "support/backend_test.h"
#include "support/gemm_case.h"
#include "support/matrices.h"
#include "support/quantized_result.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

Stored aligned(const Dense& values, Format format) {
  return Stored(values, format, Stored::kAligned, Stored::kAligned);
}
Stored aligned_poisoned(std::int64_t rows, std::int64_t cols, Format format) {
  return Stored::poisoned(rows, cols, format, Stored::kAligned, Stored::kAligned);
}

class ProductsTest : public BackendTest {};

// Every width up to several groups of eight and beyond a block's share of a row.
TEST_P(ProductsTest, ConvertsAlignedRows) {
  Random random(1);
  for (const std::int64_t cols : {8, 16, 24, 64, 72, 2048, 4096, 4104, 9000}) {
    for (const Format from : kFloatFormats) {
      for (const Format to : kFloatFormats) {
        const Stored a = aligned(random.dense(3, cols), from);
        Stored out = aligned_poisoned(3, cols, to);
        backend().copy(a.view(), out.mutable_view());
        EXPECT_EQ(out.values().values, Stored(a.values(), to).values().values) << cols;
        EXPECT_TRUE(out.padding_intact());
      }
    }
  }
}

TEST_P(ProductsTest, DecodesByWords) {
  Random random(2);
  for (const std::int64_t cols : {8, 40, 64, 136, 4096, 4104, 8200}) {
    for (const Format to : kFloatFormats) {
      const auto check = [&](const auto& weight) {
        Stored out = random.coin() ? aligned_poisoned(5, cols, to) : Stored::poisoned(5, cols, to);
        backend().copy(weight.view(), out.mutable_view());
        EXPECT_EQ(out.values().values, Stored(weight.values(), to).values().values)
            << cols << ", " << name(weight.view().format);
        EXPECT_TRUE(out.padding_intact());
      };
      for (const bool nested : {false, true}) {
        check(StoredLevels(random, Format::nf4, 5, cols, random.pick({32, 64, 4096}), nested));
      }
      check(StoredLevels(random, Format::mxfp4, 5, cols, 32, false));
      check(StoredLevels(random, Format::nvfp4, 5, cols, 16, false));
      check(StoredLevels(random, Format::int4, 5, cols, random.pick({32, 64, 128}), false));
      check(StoredInt8(random, 5, cols));
      for (const auto& [height, width] : {std::pair{1, 32}, {128, 128}, {2, 24}, {3, 17}}) {
        check(
            StoredFp8(random, 5, cols, height, width, random.pick({ScaleKind::f32, ScaleKind::bf16, ScaleKind::e8m0})));
      }
    }
  }
}

// From any row and column on, of any width.
TEST_P(ProductsTest, DecodesAnyPartOfAWeight) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(5);
  const auto check = [&](const auto& weight) {
    for (const auto& [row, col, cols] : {std::tuple{1, 8, 64}, {2, 3, 64}, {3, 16, 37}, {0, 1, 5}}) {
      Stored out = Stored::poisoned(4, cols, Format::f32);
      Staging at(context);
      cuda::decode_codes(context, at(weight.view()), row, col, at(out.mutable_view()));
      at.finish();
      const Dense values = weight.values(), part = out.values();
      for (std::int64_t i = 0; i < 4; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) ASSERT_EQ(part(i, j), values(row + i, col + j)) << i << ", " << j;
      }
      EXPECT_TRUE(out.padding_intact());
    }
  };
  for (const Form form : {Form::nf4, Form::int8, Form::mxfp4}) check(Operand(random, 7, 72, form));
  for (const int width : {17, 24}) check(StoredFp8(random, 7, 72, 2, width, ScaleKind::f32));
}

// Its largest element beyond what all threads look at first, and beyond what is decoded at a time.
TEST_P(ProductsTest, MaxAbsOfALargeWeightInNf4) {
  const std::int64_t cols = 4096, rows = cuda::kChunkBytes / (4 * cols) + 1;
  std::vector<std::uint8_t> codes(code_bytes(Format::nf4, rows * cols), 0x87);  // levels 0.08 and 0
  const std::vector<float> absmax(ceil_div(rows * cols, std::int64_t{4096}), 1.0f);
  Matrix weight{codes.data(), rows, cols, 0, Format::nf4};
  weight.scales = {4096, absmax.data()};
  for (const std::int64_t row : {rows / 3, rows - 1}) {
    std::uint8_t& last = codes[(row + 1) * cols / 2 - 1];
    last = 0x80;  // -1 in the low nibble
    auto tested = backend();
    EXPECT_EQ(max_abs(tested, weight), 1.0f) << row;
    last = 0x87;
  }
}

// Codes that no word starts at.
TEST_P(ProductsTest, DecodesAtOddAddresses) {
  Random random(12);
  for (const Form form : {Form::nf4_nested, Form::int8}) {
    const Operand weight(random, 5, 64, form);
    Matrix view = weight.view();
    const auto* codes = static_cast<const std::uint8_t*>(view.data);
    for (const int skip : {1, 2, 3, 4}) {
      std::vector<std::uint8_t> shifted(skip, 0xee);
      shifted.insert(shifted.end(), codes, codes + code_bytes(view.format, 5 * 64));
      view.data = shifted.data() + skip;
      Stored out = aligned_poisoned(5, 64, Format::bf16);
      backend().copy(view, out.mutable_view());
      EXPECT_EQ(out.values().values, Stored(weight.values(), Format::bf16).values().values) << skip;
    }
  }
}

// y is made of columns that each chunk of the weight gives; chunks of one tile of 64 columns, of some, of all.
TEST_P(ProductsTest, ChunksOfAWeightGiveTheSame) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(3);
  const std::int64_t m = 23;
  for (const Op op : {Op::t, Op::n}) {
    for (const auto& [out, in] : {std::pair{200, 136}, {136, 200}, {130, 70}}) {
      const Operand nf4(random, out, in, Form::nf4_nested), int8(random, out, in, Form::int8);
      const Stored dense(random.dense(out, in), Format::f16);
      const std::int64_t k = op == Op::t ? in : out, n = op == Op::t ? out : in;
      const Stored x(random.dense(m, k), Format::bf16), a(random.dense(m, 3), Format::f32);
      const Stored b(op == Op::t ? random.dense(n, 3) : random.dense(3, n), Format::f32);
      const Stored bias(random.dense(1, n), Format::bf16);
      for (const Matrix& w : {nf4.view(), int8.view(), dense.view()}) {
        const Format format = is_quantized(w.format) ? Format::bf16 : Format::f32;
        std::vector<std::vector<std::uint8_t>> results;
        for (const std::int64_t chunk : {1 << 30, 3 * 64 * 136 * 2, 1}) {
          Stored y = Stored::poisoned(m, n, format);
          Staging at(context);
          const std::vector<Term> tail{{at(a.view()), Op::n, at(b.view()), op, 2.0f, Precision::bf16}};
          cuda::weight_product(context, at(x.view()), at(w), op, 1.0f, Precision::bf16, tail,
                               op == Op::t ? at(bias.view()) : Matrix{}, at(y.mutable_view()), chunk);
          at.finish();
          results.push_back(y.bytes());
        }
        EXPECT_TRUE(results[1] == results[0]);
        EXPECT_TRUE(results[2] == results[0]);
      }
    }
  }
}

// Pieces of the residual that is quantised, of some rows and of single blocks, give the codes of the whole.
TEST_P(ProductsTest, PiecesOfAResidualGiveTheSameCodes) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(4);
  for (const auto& [quantized, rows, cols, blocksize] : {std::tuple{Format::nf4, 37, 64, 64},
                                                         {Format::nf4, 41, 67, 32},
                                                         {Format::nf4, 9, 1000, 256},
                                                         {Format::nf4, 70, 3, 64},
                                                         {Format::int8, 41, 67, 67},
                                                         {Format::int8, 37, 64, 64},
                                                         {Format::nvfp4, 37, 64, 16},
                                                         {Format::fp8, 41, 67, 67}}) {
    const Stored w(random.dense(rows, cols), Format::bf16), b(random.dense(rows, 4), Format::f32),
        a(random.dense(4, cols), Format::f32);
    std::vector<QuantizedResult> results;
    for (const std::int64_t bytes : {std::int64_t{1} << 30, std::int64_t{10} * cols * 4, std::int64_t{1}}) {
      QuantizedResult result(quantized, rows, cols, blocksize);
      Staging at(context);
      const std::vector<Term> terms{{at(b.view()), Op::n, at(a.view()), Op::n, -0.5f}};
      QuantOutput out = result.output();
      out.codes = at.upload(out.codes, static_cast<std::int64_t>(result.codes.size()), true);
      out.scales = at.upload(out.scales, static_cast<std::int64_t>(result.scales.size()), true);
      out.global = at.upload(out.global, 1);
      cuda::quantized_sum(context, terms, at(w.view()), out, bytes);
      at.finish();
      EXPECT_TRUE(result.padding_intact());
      result.scales.pop_back();
      for (const float scale : result.scales) ASSERT_GE(scale, 0.0f);
      results.push_back(result);
    }
    EXPECT_TRUE(results[1] == results[0]);
    EXPECT_TRUE(results[2] == results[0]);
  }
}

// Thin products in half precision and what they are added to take one rounding: 1 + 2^-9 - 2 * 2^-9 + 2^-9 is 1.
TEST_P(ProductsTest, ThinProductsAreRoundedOnce) {
  const Stored one(Dense(20, 1, 1), Format::f32), two(Dense(20, 2, 1), Format::f32);
  const Stored small(Dense(1, 30, 0x1p-9), Format::f32), minus(Dense(2, 30, -0x1p-9), Format::f32);
  const Stored addend(Dense(20, 30, 1), Format::bf16);
  const Term terms[] = {{one.view(), Op::n, small.view(), Op::n, 1.0f, Precision::bf16},
                        {two.view(), Op::n, minus.view(), Op::n, 1.0f, Precision::bf16},
                        {one.view(), Op::n, small.view(), Op::n, 1.0f, Precision::bf16}};
  Stored out = Stored::poisoned(20, 30, Format::bf16);
  backend().gemm(terms, addend.view(), out.mutable_view());
  EXPECT_EQ(out.values().values, addend.values().values);
}

// Of one term, and of several that share it: factors in half precision meet in f32, and the scale after them.
TEST_P(ProductsTest, AScaleRoundsNoFactor) {
  Random random(13);
  const Dense a = Stored(random.dense(40, 7), Format::bf16).values(),
              b = Stored(random.dense(7, 30), Format::bf16).values();
  const Stored a_stored(a, Format::bf16), b_stored(b, Format::bf16);
  const Term term{a_stored.view(), Op::n, b_stored.view(), Op::n, 0.3f, Precision::bf16};
  for (const std::int64_t count : {1, 2}) {
    const std::vector<Term> terms(static_cast<std::size_t>(count), term);
    Stored out = Stored::poisoned(40, 30, Format::f32);
    backend().gemm(terms, {}, out.mutable_view());
    const double scale = static_cast<double>(count) * double{0.3f};
    expect_close(out, {scale * (a * b), scale * (absolute(a) * absolute(b))}, 7 * count + 2);
  }
}

// Terms of several scales as one product: 0.3 times the smaller factor is rounded, the larger one stays as it is.
TEST_P(ProductsTest, TheSmallerFactorCarriesAScaleOfItsOwn) {
  Random random(14);
  const double scale = kBf16.decode(kBf16.encode(0.3f));
  const Dense large = Stored(random.dense(40, 2), Format::bf16).values();
  for (const bool left : {true, false}) {  // where the larger factor stands
    const Dense ones = left ? Dense(2, 20, 1) : Dense(20, 2, 1);
    const Stored a(left ? large : ones, Format::bf16), b(left ? ones : transposed(large), Format::bf16);
    const Term terms[] = {{a.view(), Op::n, b.view(), Op::n, 0.3f, Precision::bf16},
                          {a.view(), Op::n, b.view(), Op::n, 1.0f, Precision::bf16}};
    const Dense a_values = a.values(), b_values = b.values();
    Stored out = Stored::poisoned(a_values.rows, b_values.cols, Format::f32);
    backend().gemm(terms, {}, out.mutable_view());
    expect_close(out, {(1 + scale) * (a_values * b_values), (1 + scale) * (absolute(a_values) * absolute(b_values))},
                 6);
  }
}

// One product would round a factor with its scale, or factors that keep every digit to the others' half precision.
TEST_P(ProductsTest, ThinProductsThatCannotBeOne) {
  Random random(6);
  for (const Form second : {Form::bf16, Form::f32}) {
    TermList list(20, 30);
    list.add(random, 5, Form::bf16, Op::n, Form::bf16, Op::n, second == Form::bf16 ? -0.3f : 1.0f);
    list.add(random, 4, second, Op::n, second, Op::n, 1.0f);
    Stored out = Stored::poisoned(20, 30, Format::f32);
    backend().gemm(list.terms(), {}, out.mutable_view());
    expect_close(out, list.expected(), list.roundings());
  }
}

// Below half a unit, both, and together above it.
TEST_P(ProductsTest, AnAddendInF32IsNotRoundedFirst) {
  const Stored a(Dense(20, 1, 1), Format::bf16), b(Dense(1, 30, 3 * 0x1p-10), Format::bf16);
  const Stored addend(Dense(20, 30, 1 + 3 * 0x1p-10), Format::f32);
  const Term terms[] = {{a.view(), Op::n, b.view(), Op::n}};
  Stored out = Stored::poisoned(20, 30, Format::bf16);
  backend().gemm(terms, addend.view(), out.mutable_view());
  EXPECT_EQ(out.values().values, Dense(20, 30, 1 + 0x1p-7).values);
}

TEST_P(ProductsTest, ABiasAndNothingToMultiply) {
  Random random(7);
  const Stored x(Dense(20, 0), Format::bf16), weight(Dense(30, 0), Format::bf16),
      bias(random.dense(1, 30), Format::bf16);
  Stored y = Stored::poisoned(20, 30, Format::bf16);
  backend().weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::f32, {}, bias.view(), y.mutable_view());
  EXPECT_EQ(y.values().values, (Dense(20, 1, 1) * bias.values()).values);
}

// Where cuBLAS divides a sum among blocks, its parts are not rounded: (1 + 2^-9) - 1 is 2^-9.
TEST_P(ProductsTest, PartsOfASumAreNotRounded) {
  for (const Format format : {Format::bf16, Format::f16}) {
    const double small = format == Format::bf16 ? 0x1p-9 : 0x1p-12;
    Dense a_values(20, 4);
    for (std::int64_t i = 0; i < 20; ++i) a_values(i, 0) = 1, a_values(i, 1) = small, a_values(i, 2) = -1;
    const Stored a(a_values, format), b(Dense(4, 30, 1), format);
    Stored out = Stored::poisoned(20, 30, format);
    const Term terms[] = {{a.view(), Op::n, b.view(), Op::n}};
    backend().gemm(terms, {}, out.mutable_view());
    EXPECT_EQ(out.values().values, Dense(20, 30, small).values);
  }
}

PISSA_EVERY_BACKEND(ProductsTest);

}  // namespace
}  // namespace pissa::test
