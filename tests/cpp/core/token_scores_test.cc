// Scores of tokens: the softmax's row by row, and the algorithm that computes logits a chunk at a time.
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

class TokenScoresTest : public BackendTest {
 protected:
  struct Found {
    std::vector<float> scores, gradient;
  };
  Found score(std::vector<float> logits, std::int64_t label, float scale = 1, float cap = 0,
              bool gradient = true) const {
    Found found{std::vector<float>(kScores), logits};
    const auto count = static_cast<std::int64_t>(logits.size());
    backend().score_rows({found.gradient.data(), 1, count, count, Format::f32}, &label, scale, cap,
                         {found.scores.data(), 1, kScores, kScores, Format::f32}, gradient);
    return found;
  }
};

// z is off by 8 units of the cap, or 1 of itself; a sum by 64 + 4 of its size, exp by 4, log by 1; and what an exponent
// is off by, so is its exponential.
TEST_P(TokenScoresTest, RowsAgreeWithFloat64) {
  Random random(1);
  for (const std::int64_t count : {1, 2, 15, 16, 17, 300, 1024, 1025, 3000}) {
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

// The steps by themselves give the same, for a weight in any form; where the vocabulary is large, in several chunks.
TEST_P(TokenScoresTest, IsTheProductsAroundTheRows) {
  Random random(3);
  const auto check = [&](std::int64_t tokens, std::int64_t in, std::int64_t out, Form form, Format format) {
    SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << name(form) << ", " << name(format));
    const Operand weight(random, out, in, form);
    const Stored x(random.dense(tokens, in), format), bias(random.dense(1, out), Format::f32);
    std::vector<std::int64_t> labels;
    for (std::int64_t i = 0; i < tokens; ++i) labels.push_back(random.below(out));
    const Precision precision = precision_of(format);
    auto tested = backend();

    Stored logits = Stored::poisoned(tokens, out, Format::f32);
    Stored expected = Stored::poisoned(tokens, kScores, Format::f32),
           expected_dx = Stored::poisoned(tokens, in, format);
    tested.weight_gemm_nt(x.view(), weight.view(), 1.0f, precision, {}, bias.view(), logits.mutable_view());
    tested.score_rows(logits.mutable_view(), labels.data(), 0.5f, 20.0f, expected.mutable_view(), true);
    tested.weight_gemm_nn(logits.view(), weight.view(), 1.0f, precision, {}, expected_dx.mutable_view());

    Stored scores = Stored::poisoned(tokens, kScores, Format::f32), dx = Stored::poisoned(tokens, in, format);
    token_scores(tested, x.view(), weight.view(), bias.view(), labels.data(), 0.5f, 20.0f, scores.mutable_view(),
                 dx.mutable_view());
    EXPECT_EQ(scores.values().values, expected.values().values);
    EXPECT_EQ(dx.values().values, expected_dx.values().values);
    Stored alone = Stored::poisoned(tokens, kScores, Format::f32);
    token_scores(tested, x.view(), weight.view(), bias.view(), labels.data(), 0.5f, 20.0f, alone.mutable_view(), {});
    EXPECT_EQ(alone.values().values, expected.values().values);
  };
  for (const Form form : kForms) {
    for (const Format format : kFloatFormats) check(21, 64, 96, form, format);
  }
  const std::int64_t rows_of_chunk = 40;
  if (const std::int64_t out = decltype(backend())::kLogitBytes / 4 / rows_of_chunk; out < 1 << 20) {
    check(3 * rows_of_chunk, 3, out, Form::f32, Format::f32);
  }
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
