// Scores of tokens, their sums and their gradient, with the vocabulary read in parts.
#include "pissa/core/token_scores.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// In f64.
struct Row {
  std::vector<double> z, p, slope;
  double log_p, entropy, log_squares, mean;
  bool is_largest;

  Row(const std::vector<float>& logits, std::int64_t label, double scale, double cap) {
    double sum = 0, largest = -INFINITY, squares = 0;
    mean = entropy = 0;
    for (const float logit : logits) {
      z.push_back(cap > 0 ? cap * std::tanh(scale * logit / cap) : scale * logit);
      slope.push_back(cap > 0 ? scale * (1 - z.back() / cap * z.back() / cap) : scale);
      mean += z.back() / static_cast<double>(logits.size());
      largest = std::max(largest, z.back());
    }
    for (const double value : z) sum += std::exp(value - largest);
    for (const double value : z) {
      const double log_of = value - largest - std::log(sum);
      p.push_back(std::exp(log_of));
      squares += p.back() * p.back();
      if (p.back() > 0) entropy -= p.back() * log_of;
    }
    log_p = z[label] - largest - std::log(sum);
    log_squares = std::log(squares);
    is_largest = z[label] >= largest;
  }
};

// A part of the vocabulary in these tests, and so its logits' bytes for one token.
constexpr std::int64_t kPart = 256;

class TokenScoresTest : public BackendTest {
 protected:
  struct Found {
    std::vector<float> scores, gradient;
  };
  // The gradient is that of the logits: they are the bias of a product that is 0, with the identity.
  Found score(const std::vector<float>& logits, std::int64_t label, float scale = 1, float cap = 0,
              bool gradient = true) const {
    const auto count = static_cast<std::int64_t>(logits.size());
    Dense identity(count, count);
    for (std::int64_t i = 0; i < count; ++i) identity(i, i) = 1;
    const Stored x(Dense(1, count), Format::f32), weight(identity, Format::f32);
    Found found{std::vector<float>(kScores), std::vector<float>(logits.size())};
    const MutableMatrix dx{found.gradient.data(), 1, count, count, Format::f32};
    auto tested = backend();
    token_scores(tested, x.view(), weight.view(), {logits.data(), 1, count, count, Format::f32}, &label, scale, cap,
                 {found.scores.data(), 1, kScores, kScores, Format::f32}, gradient ? dx : MutableMatrix{}, 4 * kPart);
    return found;
  }
};

// z is off by 8 units of the cap, or 1 of itself; a sum by 64 + 4 of its size, exp by 4, log by 1; and what an exponent
// is off by, so is its exponential.
TEST_P(TokenScoresTest, RowsAgreeWithFloat64) {
  Random random(1);
  for (const std::int64_t count : {1, 2, 15, 16, 17, 300, 600}) {
    for (const double spread : {0.1, 3.0, 40.0}) {
      for (const auto& [scale, cap] : {std::pair{1.0f, 0.0f}, {0.25f, 0.0f}, {1.0f, 30.0f}, {2.0f, 5.0f}}) {
        SCOPED_TRACE(::testing::Message() << count << ", " << spread << ", " << scale << ", " << cap);
        std::vector<float> logits;
        double largest = cap;
        for (std::int64_t i = 0; i < count; ++i) {
          logits.push_back(static_cast<float>(spread * (2 * random.uniform() - 1)));
          largest = std::max(largest, std::abs(double{scale} * logits.back()));
        }
        const std::int64_t label = random.below(count);
        const Row exact(logits, label, scale, cap);
        const Found found = score(logits, label, scale, cap);
        const double bound = kUnit * (80 + 20 * largest);
        EXPECT_NEAR(found.scores[0], exact.log_p, bound);
        EXPECT_NEAR(found.scores[1], exact.entropy, bound * (1 + 2 * largest));
        EXPECT_NEAR(found.scores[2], exact.log_squares, 2 * bound);
        EXPECT_NEAR(found.scores[3], exact.mean, bound);
        if (spread > 1 && cap == 0) {
          EXPECT_EQ(found.scores[4], exact.is_largest ? 1.0f : 0.0f);
        }
        for (std::int64_t i = 0; i < count; ++i) {
          const double one = i == label ? 1 : 0;
          const double expected = (one - exact.p[i]) * exact.slope[i];
          const double allowed = scale * ((one + exact.p[i]) * (2 * bound + 16 * kUnit) + 1e-37);
          ASSERT_NEAR(found.gradient[i], expected, allowed) << "element " << i;
        }
      }
    }
  }
}

TEST_P(TokenScoresTest, WithoutAGradientTheScoresAreTheSame) {
  Random random(2);
  std::vector<float> logits;
  for (int i = 0; i < 200; ++i) logits.push_back(static_cast<float>(random.uniform()));
  EXPECT_EQ(score(logits, 7, 1, 0, false).scores, score(logits, 7).scores);
}

TEST_P(TokenScoresTest, WhatIsNotFinite) {
  const std::vector<float> hidden{1, -kInfinity, 2, -kInfinity};
  const Found found = score(hidden, 2);
  EXPECT_NEAR(found.scores[0], -std::log1p(std::exp(-1.0)), 1e-6);
  EXPECT_NEAR(found.gradient[1], 0, 1e-37);
  EXPECT_EQ(score(hidden, 1).scores[0], -kInfinity);
  for (const std::vector<float>& logits : {std::vector<float>{1, kNan, 2}, {kNan, 1, 2}, {1, kInfinity, 2}}) {
    const Found bad = score(logits, 2);
    EXPECT_TRUE(std::isnan(bad.scores[0])) << "loss";
    EXPECT_TRUE(std::isnan(bad.gradient[0])) << "gradient";
  }
  for (const std::int64_t label : {-100, -1, 3}) {
    const Found outside = score({1, 2, 3}, label);
    EXPECT_TRUE(std::isnan(outside.scores[0]) && std::isnan(outside.gradient[1])) << label;
    EXPECT_NEAR(outside.scores[1], Row({1, 2, 3}, 0, 1, 0).entropy, 1e-6) << label;
  }
}

// A confident token's gradient is small, and has as many digits as others'.
TEST_P(TokenScoresTest, ASureTokenKeepsItsDigits) {
  std::vector<float> logits(700);
  logits[400] = 30;
  const Row exact(logits, 400, 1, 0);
  const Found found = score(logits, 400);
  double others = 0;
  for (std::int64_t i = 0; i < 700; ++i) others += i == 400 ? 0 : exact.p[i];
  EXPECT_NEAR(found.gradient[400], others, 200 * kUnit * others);
  EXPECT_NEAR(found.gradient[7], -exact.p[7], 200 * kUnit * exact.p[7]);
}

// z is off by what the product's operands lose, u each, and p by twice that, relatively. With the bound of the sums of
// `RowsAgreeWithFloat64`, and the operands' rounding in the second product.
TEST_P(TokenScoresTest, AgreesWithFloat64ForWeightsInAnyForm) {
  Random random(3);
  const auto check = [&](std::int64_t tokens, std::int64_t in, std::int64_t out, Form form, Format format) {
    SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << name(form) << ", " << name(format));
    constexpr double kScale = 0.25, kCap = 20;
    const Operand weight(random, out, in, form);
    const Stored x(random.dense(tokens, in), format), bias(random.dense(1, out), Format::f32);
    std::vector<std::int64_t> labels;
    for (std::int64_t i = 0; i < tokens; ++i) labels.push_back(random.below(out));
    Stored scores = Stored::poisoned(tokens, kScores, Format::f32), dx = Stored::poisoned(tokens, in, format);
    auto tested = backend();
    const auto run = [&](const MutableMatrix& found, const MutableMatrix& gradient) {
      token_scores(tested, x.view(), weight.view(), bias.view(), labels.data(), static_cast<float>(kScale),
                   static_cast<float>(kCap), found, gradient, 4 * kPart * std::min(tokens, std::int64_t{32}));
    };
    run(scores.mutable_view(), dx.mutable_view());
    Stored alone = Stored::poisoned(tokens, kScores, Format::f32);
    run(alone.mutable_view(), {});
    EXPECT_EQ(alone.values().values, scores.values().values);

    const Dense w = weight.values(), x_values = x.values(), found = dx.values();
    const Dense l = x_values * transposed(w), size = absolute(x_values) * transposed(absolute(w));
    const double unit = format == Format::f32 ? kUnit : format == Format::bf16 ? 0x1p-8 : 0x1p-11;
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<float> logits;
      double off = 0;  // of z
      for (std::int64_t v = 0; v < out; ++v) {
        logits.push_back(static_cast<float>(l(t, v) + bias.values()(0, v)));
        off = std::max(off, kScale * ((2 * unit + gamma(in + 3)) * size(t, v)));
      }
      off += 100 * kUnit * kCap;
      const Row exact(logits, labels[t], kScale, kCap);
      EXPECT_NEAR(scores.values()(t, 0), exact.log_p, 2 * off);
      const double less = std::expm1(2 * off) + 2 * off / kCap + 3 * unit + gamma(out);
      for (std::int64_t j = t % 2; j < in; j += 7) {
        double expected = 0, allowed = 0;
        for (std::int64_t v = 0; v < out; ++v) {
          const double one = v == labels[t] ? 1 : 0;
          expected += (one - exact.p[v]) * exact.slope[v] * w(v, j);
          allowed += less * kScale * (one + exact.p[v]) * std::abs(w(v, j));
        }
        ASSERT_NEAR(found(t, j), expected, allowed + 2 * unit * std::abs(expected)) << t << ", " << j;
      }
    }
  };
  for (const Form form : kForms) {
    for (const Format format : kFloatFormats) check(17, 64, 600, form, format);
  }
  check(decltype(backend())::kScoredTokens + 3, 2, 20, Form::f32, Format::bf16);
}

TEST_P(TokenScoresTest, RefusesScoresOfAnotherShape) {
  auto tested = backend();
  const Stored x(Dense(2, 4), Format::f32), weight(Dense(3, 4), Format::f32);
  Stored scores(Dense(2, 4), Format::f32);
  const std::vector<std::int64_t> labels{0, 1};
  EXPECT_THROW(token_scores(tested, x.view(), weight.view(), {}, labels.data(), 1.0f, 0.0f, scores.mutable_view(), {}),
               std::exception);
}

PISSA_EVERY_BACKEND(TokenScoresTest);

}  // namespace
}  // namespace pissa::test
