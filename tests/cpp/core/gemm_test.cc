// gemm: sums of products and an addend, in every orientation and format, at every edge of the blocking.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "support/backend_test.h"
#include "support/gemm_case.h"
#include "support/quantized_result.h"

namespace pissa::test {
namespace {

constexpr std::initializer_list<Precision> kPrecisions = {Precision::f32, Precision::bf16, Precision::f16};

class GemmTest : public BackendTest {
 protected:
  TermList terms(std::int64_t m, std::int64_t n, Precision precision) const {
    return {m, n, precision, rounds(precision)};
  }
};

TEST_P(GemmTest, EveryOrientationFormatAndPrecision) {
  Random random(1);
  for (const Op op_a : {Op::n, Op::t}) {
    for (const Op op_b : {Op::n, Op::t}) {
      for (const Form form_a : kForms) {
        for (const Form form_b : kForms) {
          for (const Precision precision : kPrecisions) {
            const Format out_format = random.pick(kFloatFormats);
            SCOPED_TRACE(::testing::Message() << name(form_a) << (op_a == Op::n ? " n, " : " t, ") << name(form_b)
                                              << (op_b == Op::n ? " n, " : " t, ") << static_cast<int>(precision));
            TermList list = terms(17, 37, precision);
            list.add(random, 23, form_a, op_a, form_b, op_b, list.random_scale(random));
            Stored out = Stored::poisoned(17, 37, out_format);
            backend().gemm(list.terms(), {}, out.mutable_view());
            expect_close(out, list.expected(), list.roundings());
          }
        }
      }
    }
  }
}

// One to three terms, with and without an addend, at every edge.
TEST_P(GemmTest, EverySize) {
  Random random(2);
  for (const auto& [m, n, k] : edge_sizes()) {
    SCOPED_TRACE(::testing::Message() << "m, n, k = " << m << ", " << n << ", " << k);
    TermList list = terms(m, n, random.pick(kPrecisions));
    const std::int64_t count = 1 + random.below(3);
    for (std::int64_t i = 0; i < count; ++i) {
      list.add(random, i == 0 ? k : 1 + random.below(9), random.pick(kForms), random_op(random), random.pick(kForms),
               random_op(random), list.random_scale(random));
    }
    const Operand addend(random, m, n, random.pick(kForms));
    const bool adds = random.coin();
    if (adds) list.add_expected(bounded(addend.values()));
    Stored out = Stored::poisoned(m, n, random.pick(kFloatFormats), random.below(4));
    backend().gemm(list.terms(), adds ? addend.view() : Matrix{}, out.mutable_view());
    expect_close(out, list.expected(), list.roundings(), list.bf16_roundings());
  }
}

TEST_P(GemmTest, AddsToItsOutputInPlace) {
  Random random(3);
  for (const Format format : kFloatFormats) {
    for (const auto& [m, n, k] : {Size{15, 33, 17}, Size{5, 300, 3}, Size{340, 9, 4}}) {
      Stored out(random.dense(m, n), format);
      TermList list(m, n);
      list.add(random, k, Form::f32, Op::n, Form::bf16, Op::t, -0.3f);
      list.add_expected(bounded(out.values()));
      backend().gemm(list.terms(), out.view(), out.mutable_view());
      expect_close(out, list.expected(), list.roundings());
    }
  }
}

TEST_P(GemmTest, WithoutTermsItIsTheAddend) {
  Random random(4);
  const Stored addend(random.dense(7, 70), Format::bf16);
  Stored out = Stored::poisoned(7, 70, Format::f32);
  backend().gemm({}, addend.view(), out.mutable_view());
  EXPECT_EQ(out.values().values, addend.values().values);
  EXPECT_TRUE(out.padding_intact());
}

// a^T b with fewer columns than rows is computed and stored the other way round, also where a block is as tall as it
// gets; not with an addend.
TEST_P(GemmTest, FewerColumnsThanRowsOfATransposedProduct) {
  Random random(8);
  for (const auto& [m, n] : {std::pair{600, 1}, {700, 17}, {530, 513}, {530, 518}, {1040, 1036}}) {
    SCOPED_TRACE(::testing::Message() << "m, n = " << m << ", " << n);
    TermList list = terms(m, n, random.pick(kPrecisions));
    list.add(random, 5, Form::bf16, Op::t, Form::f32, Op::n, list.random_scale(random));
    const Operand addend(random, m, n, Form::f32);
    for (const Matrix& added : {Matrix{}, addend.view()}) {
      if (added) list.add_expected(bounded(addend.values()));
      Stored out = Stored::poisoned(m, n, random.pick(kFloatFormats), random.below(4));
      backend().gemm(list.terms(), added, out.mutable_view());
      expect_close(out, list.expected(), list.roundings());
    }
  }
}

TEST_P(GemmTest, InnerDimensionZeroGivesZero) {
  Random random(5);
  TermList list(9, 40);
  list.add(random, 0, Form::f32, Op::n, Form::f32, Op::t, 1.0f);
  Stored out = Stored::poisoned(9, 40, Format::f32);
  backend().gemm(list.terms(), {}, out.mutable_view());
  for (const double value : out.values().values) EXPECT_EQ(value, 0.0);
}

TEST_P(GemmTest, PassesNanAndInfinityOn) {
  for (const double special : {std::nan(""), HUGE_VAL}) {
    Dense a(3, 20);
    a(1, 13) = special;
    const Stored a_stored(a, Format::f32), b_stored(Dense(20, 5, 1), Format::f32);
    Stored out = Stored::poisoned(3, 5, Format::bf16);
    const Term terms[] = {{a_stored.view(), Op::n, b_stored.view(), Op::n, 1.0f}};
    backend().gemm(terms, {}, out.mutable_view());
    const Dense values = out.values();
    for (std::int64_t j = 0; j < 5; ++j) {
      EXPECT_EQ(values(0, j), 0.0);
      EXPECT_EQ(std::isnan(values(1, j)), std::isnan(special));
      EXPECT_FALSE(std::isfinite(values(1, j)));
      EXPECT_EQ(values(2, j), 0.0);
    }
  }
}

TEST_P(GemmTest, TheSameBits) {
  for (const auto& [m, n, k] :
       {Size{513, 257, 19}, Size{23, 1030, 40}, Size{1100, 31, 40}, Size{1, 2100, 600}, Size{90, 70, 513}}) {
    SCOPED_TRACE(::testing::Message() << "m, n, k = " << m << ", " << n << ", " << k);
    Random random(6);
    const Operand a(random, m, k, Form::f32);
    const Operand b(random, n, k, Form::nf4);
    const Operand c(random, 5, m, Form::bf16);
    const Operand d(random, 5, n, Form::f16);
    const Operand addend(random, m, n, Form::f32);
    const Term terms[] = {{a.view(), Op::n, b.view(), Op::t, 0.3f}, {c.view(), Op::t, d.view(), Op::n, 1.0f}};
    expect_same_bits([&, m = m, n = n](auto& cpu) {
      Stored out = Stored::poisoned(m, n, Format::f32);
      cpu.gemm(terms, addend.view(), out.mutable_view());
      return out.bytes();
    });
  }
}

// The most terms that the concept names are computed elsewhere; one more is refused, and nothing is written.
TEST_P(GemmTest, MoreTermsThanASumMayHaveAreRefused) {
  Random random(6);
  TermList list(9, 40);
  for (std::size_t i = 0; i <= kMostTerms; ++i) {
    list.add(random, 3, Form::f32, Op::n, Form::f32, Op::n, 1.0f);
  }
  const std::span<const Term> terms(list.terms());
  const Stored weight(random.dense(9, 40), Format::f32);
  QuantizedResult result(Format::nf4, 9, 40);
  Stored out = Stored::poisoned(9, 40, Format::f32);
  const Stored untouched = out;
  auto tested = backend();
  const Term& product = terms[0];
  const auto tail = terms.last(kMostTail + 1);
  EXPECT_THROW(tested.gemm(terms, {}, out.mutable_view()), std::invalid_argument);
  EXPECT_THROW(tested.gemm_quantized(terms, weight.view(), result.output()), std::invalid_argument);
  EXPECT_THROW(tested.weight_gemm_nt(product.a, product.b, 1.0f, Precision::f32, tail, {}, out.mutable_view()),
               std::invalid_argument);
  EXPECT_THROW(tested.weight_gemm_nn(product.a, product.b, 1.0f, Precision::f32, tail, out.mutable_view()),
               std::invalid_argument);
  EXPECT_TRUE(out.bytes() == untouched.bytes());
  EXPECT_TRUE(result.untouched());
}

PISSA_EVERY_BACKEND(GemmTest);

}  // namespace
}  // namespace pissa::test
