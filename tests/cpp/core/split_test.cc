// split and split_quantized: start factors, residuals, and what is refused.
#include "pissa/core/split.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "pissa/cpu/isa.h"
#include "pissa/cpu/kernels.h"
#include "support/backend_test.h"
#include "support/krylov_reference.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/quantized_result.h"
#include "support/reference.h"
#include "support/weight_classes.h"

namespace pissa::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct StartFactors {
  Stored a0, b0;
  StartFactors(const Matrix& w, std::int64_t r)
      : a0(Stored::poisoned(r, w.cols, Format::f32)), b0(Stored::poisoned(w.rows, r, Format::f32)) {}
};

class SplitTest : public BackendTest {};

// s B0 A0 is the best rank-r approximation: in norm always, and, where the next singular value leaves a gap,
// elementwise.
TEST_P(SplitTest, FactorsAreTheBestApproximation) {
  constexpr std::int64_t r = 4;
  Random random(1);
  const auto gap = [](std::int64_t i) {
    return i < r ? 8.0 - static_cast<double>(i) : std::pow(0.9, static_cast<double>(i)) / 100;
  };
  for (const Format format : kFloatFormats) {
    for (const auto& [rows, cols] : {std::pair{50, 70}, {70, 50}}) {
      const Stored weight(with_spectrum(random, rows, cols, gap), format);
      const Dense w = weight.values();
      const Svd exact = jacobi_svd(w);
      const Dense vectors = rows_of(exact.v, 0, r);
      const Dense best = (w * transposed(vectors)) * vectors;
      for (const float s : {1.0f, 0.5f, 2.0f, 16 / std::sqrt(4.0f)}) {  // the last one is rsLoRA's
        SCOPED_TRACE(::testing::Message() << name(format) << " [" << rows << ", " << cols << "], scaling " << s);
        StartFactors factors(weight.view(), r);
        auto cpu = backend();
        Stored singular = Stored::poisoned(1, r, Format::f32);
        split(cpu, weight.view(), s, {}, factors.a0.mutable_view(), factors.b0.mutable_view(), std::nullopt,
              singular.mutable_view());
        EXPECT_TRUE(factors.a0.padding_intact() && factors.b0.padding_intact() && singular.padding_intact());
        const Dense a0 = factors.a0.values(), b0 = factors.b0.values();
        const Dense product = double{s} * (b0 * a0);
        const double noise =
            16 * kEps32 * std::sqrt(70.0) * norm(w);  // as in svd_test.cc, and once more for the other factor
        EXPECT_LE(norm(product - best), noise);
        EXPECT_NEAR(norm(w - product), norm(w - best), noise);
        // Balanced: both Gram matrices are S / s.
        for (std::int64_t i = 0; i < r; ++i) EXPECT_NEAR(singular.values()(0, i), exact.s[i], noise);
        const Dense gram_a = a0 * transposed(a0), gram_b = transposed(b0) * b0;
        for (std::int64_t i = 0; i < r; ++i) {
          for (std::int64_t j = 0; j < r; ++j) {
            const double expected = i == j ? exact.s[i] / s : 0;
            EXPECT_NEAR(gram_a(i, j), expected, noise / s);
            EXPECT_NEAR(gram_b(i, j), expected, noise / s);
          }
        }
      }
    }
  }
}

// On every class of weights: finite factors, and no residual larger than the best one by more than the energy loss.
TEST_P(SplitTest, EveryClass) {
  for (const WeightClass& weight_class : weight_classes(40, 60)) {
    SCOPED_TRACE(weight_class.name);
    const Stored weight(weight_class.values, Format::f32);
    const Dense w = weight.values();
    const std::int64_t r = std::min<std::int64_t>({5, w.rows, w.cols});
    StartFactors factors(weight.view(), r);
    auto cpu = backend();
    split(cpu, weight.view(), 2.0f, {SvdMethod::krylov, 12, 0}, factors.a0.mutable_view(), factors.b0.mutable_view());
    const Dense product = 2.0 * (factors.b0.values() * factors.a0.values());
    const Svd exact = jacobi_svd(w);
    Dense tail(1, static_cast<std::int64_t>(exact.s.size()) - r);
    std::copy(exact.s.begin() + r, exact.s.end(), tail.values.begin());
    const double noise = 16 * kEps32 * std::sqrt(60.0) * norm(w);
    EXPECT_LE(norm(w - product), 1.0001 * norm(tail) + noise + 0x1p-149 * static_cast<double>(w.rows * w.cols));
  }
}

// Columns that weigh ten million times as much as others, and a basis that does not fill the space: what the light
// columns add would be lost in f32 beside the heavy ones (8e-5 of the norm) unless rows are separated on the way.
TEST_P(SplitTest, SecondMomentWithOutliers) {
  constexpr std::int64_t rows = 200, cols = 100, tokens = 110, r = 30;
  Random random(9);
  Dense w = 0.01 * random.dense(rows, cols), x = random.dense(tokens, cols);
  for (std::int64_t j = 0; j < cols; ++j) w(j, j) += 1;
  for (std::int64_t i = 0; i < tokens; ++i) {
    for (const std::int64_t j : {0, 33, 66}) x(i, j) *= 100;
    x(i, 5) *= 3000;
  }
  const Stored weight(w, Format::f32), moment((1.0 / tokens) * (transposed(x) * x), Format::f32);
  StartFactors factors(weight.view(), r);
  auto tested = backend();
  split(tested, weight.view(), 1.0f, {}, factors.a0.mutable_view(), factors.b0.mutable_view(), std::nullopt, {},
        moment.view());
  const Svd exact = jacobi_svd(weight.values() * transposed(x));
  double tail = 0;
  for (std::int64_t i = r; i < static_cast<std::int64_t>(exact.s.size()); ++i) tail += exact.s[i] * exact.s[i];
  const Dense lost = weight.values() - factors.b0.values() * factors.a0.values();
  EXPECT_LE(norm(lost * transposed(x)), 1.00001 * std::sqrt(tail));
}

// The explicit residual is W - s B0 A0 in W's dtype, rounded once, also when it takes W's place.
TEST_P(SplitTest, ExplicitResidual) {
  Random random(2);
  for (const Format format : kFloatFormats) {
    Stored weight(random.dense(37, 53), format);
    StartFactors factors(weight.view(), 6);
    auto cpu = backend();
    split(cpu, weight.view(), 0.5f, {}, factors.a0.mutable_view(), factors.b0.mutable_view());
    const Dense a0 = factors.a0.values(), b0 = factors.b0.values();
    const Bounded expected{weight.values() - 0.5 * (b0 * a0),
                           absolute(weight.values()) + 0.5 * (absolute(b0) * absolute(a0))};
    const Term terms[] = {minus_factors(factors.a0.view(), factors.b0.view(), 0.5f)};
    Stored residual = Stored::poisoned(37, 53, format);
    cpu.gemm(terms, weight.view(), residual.mutable_view());
    expect_close(residual, expected, 6 + 4);
    cpu.gemm(terms, weight.view(), weight.mutable_view());
    EXPECT_EQ(weight.values().values, residual.values().values);
  }
}

// QPiSSA: the factors of W, and codes that are, one by one, those of the residual.
TEST_P(SplitTest, QuantizedResidual) {
  Random random(3);
  for (const auto& [quantized, blocksize] :
       {std::pair{Format::nf4, 64}, {Format::nf4, 256}, {Format::int8, 67}, {Format::fp8, 67}}) {
    for (const Format format : kFloatFormats) {
      const Stored weight(random.dense(41, 67), format);
      StartFactors plain(weight.view(), 5), factors(weight.view(), 5);
      QuantizedResult result(quantized, 41, 67, blocksize), expected = result;
      auto tested = backend();
      split(tested, weight.view(), 2.0f, {}, plain.a0.mutable_view(), plain.b0.mutable_view());
      split_quantized(tested, weight.view(), 2.0f, {}, factors.a0.mutable_view(), factors.b0.mutable_view(),
                      result.output());
      EXPECT_TRUE(factors.a0.bytes() == plain.a0.bytes());
      EXPECT_TRUE(factors.b0.bytes() == plain.b0.bytes());

      std::vector<float> residual(41 * 67);
      const Term terms[] = {minus_factors(plain.a0.view(), plain.b0.view(), 2.0f)};
      residual_sum(terms, weight.view(), {residual.data(), 41, 67, 67, Format::f32});
      const QuantOutput out = expected.output();
      cpu::kernels("baseline").quantize(quantized, residual.data(), 41 * 67, blocksize, 1.0f, out.codes, out.scales);
      EXPECT_TRUE(result == expected);
    }
  }
}

PISSA_EVERY_BACKEND(SplitTest);

class SplitErrors : public BackendTest {
 protected:
  // Refused with a message that starts with the argument's name, and nothing written.
  void expect_refused(const std::string& argument, const Dense& values, std::int64_t r, float scaling,
                      const SvdOptions& options = {}, std::int64_t blocksize = 64, Format format = Format::nf4) {
    const Stored weight(values, Format::f32);
    auto cpu = backend();
    QuantizedResult result(format, values.rows, values.cols);
    result.blocksize = blocksize;
    for (const bool quantize : {false, true}) {
      if (!quantize && blocksize != 64) continue;
      StartFactors factors(weight.view(), r);
      const StartFactors untouched = factors;
      try {
        if (quantize) {
          split_quantized(cpu, weight.view(), scaling, options, factors.a0.mutable_view(), factors.b0.mutable_view(),
                          result.output());
        } else {
          split(cpu, weight.view(), scaling, options, factors.a0.mutable_view(), factors.b0.mutable_view());
        }
        ADD_FAILURE() << "accepted; expected a complaint about " << argument;
      } catch (const std::invalid_argument& error) {
        EXPECT_EQ(std::string(error.what()).find(argument + ":"), 0u) << error.what();
      }
      EXPECT_TRUE(factors.a0.bytes() == untouched.a0.bytes());
      EXPECT_TRUE(factors.b0.bytes() == untouched.b0.bytes());
      EXPECT_TRUE(result.untouched());
    }
  }
};

TEST_P(SplitErrors, NameTheArgumentAndWriteNothing) {
  Random random(4);
  const Dense w = random.dense(6, 8);
  for (const float scaling : {0.0f, -1.0f, kNan, kInf}) expect_refused("scaling", w, 2, scaling);
  for (const std::int64_t r : {0, 7}) expect_refused("r", w, r, 1.0f);
  for (const std::int64_t passes : {0, 3}) expect_refused("passes", w, 2, 1.0f, {SvdMethod::krylov, passes, 0});
  for (const std::int64_t blocksize : {0, 16, 63, 8192}) expect_refused("blocksize", w, 2, 1.0f, {}, blocksize);
  for (const std::int64_t blocksize : {0, 7, 16, 48}) {  // rows have 8
    expect_refused("blocksize", w, 2, 1.0f, {}, blocksize, Format::int8);
  }
  for (const float special : {kNan, kInf, -kInf}) {
    Dense bad = w;
    bad(3, 5) = special;
    expect_refused("weight", bad, 2, 1.0f);
  }
}

TEST_P(SplitErrors, AQuantizedWeightHasNoQuantizedResidual) {
  Random random(5);
  for (const Form form : {Form::nf4, Form::int8}) {
    const Operand weight(random, 50, 40, form);
    auto cpu = backend();
    StartFactors factors(weight.view(), 2);
    QuantizedResult result(Format::nf4, 50, 40);
    EXPECT_THROW(split_quantized(cpu, weight.view(), 1.0f, {}, factors.a0.mutable_view(), factors.b0.mutable_view(),
                                 result.output()),
                 std::invalid_argument);
  }
}

PISSA_EVERY_BACKEND(SplitErrors);

}  // namespace
}  // namespace pissa::test
