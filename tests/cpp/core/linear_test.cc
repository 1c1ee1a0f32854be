// The linear layer with its adapter, forward and backward, against the paper's formulas in float64.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "support/backend_test.h"
#include "support/layer.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

/// What the backend computes, keeping sums of factors where it may.
struct Outputs {
  Stored y, xa, dx, grad_a, grad_b;

  template <class B>
  Outputs(B&& backend, const Layer& layer, Format format, bool may_keep_sums = true)
      : y(Stored::poisoned(layer.tokens, layer.out, format)),
        xa(Stored::poisoned(layer.tokens, layer.r, Format::f32)),
        dx(Stored::poisoned(layer.tokens, layer.in, format)),
        grad_a(Stored::poisoned(layer.r, layer.in, Format::f32)),
        grad_b(Stored::poisoned(layer.out, layer.r, Format::f32)) {
    const Adapter adapter = layer.adapter();
    KeptSums<B> sums(layer.x.view(), may_keep_sums ? adapter : Adapter{});
    linear_forward(backend, layer.x.view(), layer.weight.view(), layer.with_bias ? layer.bias.view() : Matrix{},
                   adapter, y.mutable_view(), xa.mutable_view(), sums.view);
    linear_backward(backend, layer.dy.view(), layer.x.view(), layer.weight.view(), adapter, xa.view(),
                    dx.mutable_view(), grad_a.mutable_view(), grad_b.mutable_view(), sums.view);
  }

  std::array<std::vector<std::uint8_t>, 5> bits() const {
    return {y.bytes(), xa.bytes(), dx.bytes(), grad_a.bytes(), grad_b.bytes()};
  }
};

void expect_gradients_close(const Outputs& outputs, const Layer& layer, const Dense& dx, const Dense& grad_a,
                            const Dense& grad_b) {
  const Magnitude magnitude(Exact(layer), layer.dy.values());
  const std::int64_t halves = bf16_roundings(layer.x.view().format);
  expect_close(outputs.dx, {dx, magnitude.dx()}, 2 * layer.out + 2 * layer.r + kFew, halves);
  if (layer.kind == Kind::none) return;
  expect_close(outputs.grad_a, {grad_a, magnitude.grad_a()}, layer.out + layer.tokens + kFew, halves);
  expect_close(outputs.grad_b, {grad_b, magnitude.grad_b()}, layer.in + layer.tokens + kFew, halves);
}

class LinearTest : public BackendTest {
 protected:
  void check(const Layer& layer, Format format) const {
    const Outputs outputs(backend(), layer, format);
    const Exact exact(layer);
    const Dense dy = layer.dy.values();
    const Magnitude magnitude(exact, dy);
    expect_close(outputs.y, {exact.y(), magnitude.y()}, 2 * layer.in + 2 * layer.r + kFew, bf16_roundings(format));
    if (layer.kind != Kind::none) {
      expect_close(outputs.xa, {exact.x * transposed(exact.a()), magnitude.xa()}, layer.in + kFew,
                   bf16_roundings(format));
    }
    expect_gradients_close(outputs, layer, exact.dx(dy), exact.grad_a(dy), exact.grad_b(dy));
  }
};

TEST_P(LinearTest, EveryKindAndFormat) {
  Random random(1);
  for (const Kind kind : kKinds) {
    for (const Format format : kFloatFormats) {
      for (const Form weight : kForms) {
        SCOPED_TRACE(::testing::Message()
                     << "kind " << static_cast<int>(kind) << ", x " << name(format) << ", weight " << name(weight));
        check(Layer(random, 5, 43, 37, 3, kind, format, weight), format);
      }
    }
  }
}

TEST_P(LinearTest, EverySize) {
  Random random(2);
  struct Shape {
    std::int64_t tokens, in, out, r;
  };
  for (const auto& [tokens, in, out, r] :
       {Shape{1, 1, 1, 1}, Shape{1, 64, 33, 1}, Shape{7, 19, 23, 19}, Shape{37, 100, 70, 8}, Shape{3, 300, 270, 16},
        Shape{340, 15, 31, 2}, Shape{300, 9, 270, 17}}) {
    for (const Kind kind : kKinds) {
      SCOPED_TRACE(::testing::Message() << tokens << ", " << in << ", " << out << ", " << r << ", kind "
                                        << static_cast<int>(kind));
      const Format format = random.pick(kFloatFormats);
      check(Layer(random, tokens, in, out, r, kind, format, random.pick(kForms)), format);
    }
  }
}

// No tokens: empty outputs, and gradients of the adapter that are zero, not left as they were.
TEST_P(LinearTest, ZeroTokensGiveZeroGradients) {
  Random random(3);
  for (const Kind kind : {Kind::lora, Kind::stored, Kind::implicit}) {
    const Layer layer(random, 0, 13, 11, 3, kind, Format::f32, Form::bf16);
    const Outputs outputs(backend(), layer, Format::f32);
    EXPECT_EQ(outputs.grad_a.values().values, std::vector<double>(3 * 13, 0.0));
    EXPECT_EQ(outputs.grad_b.values().values, std::vector<double>(11 * 3, 0.0));
  }
}

// Tokens without a gradient, at the end, here and there, and all: their dx is 0, and a backend that finds them does not
// read their x.
TEST_P(LinearTest, TokensWithoutAGradient) {
  Random random(9);
  for (const Kind kind : kKinds) {
    for (const std::int64_t every : {0, 3, 40}) {
      const Format format = random.pick(kFloatFormats);
      SCOPED_TRACE(::testing::Message() << "kind " << static_cast<int>(kind) << ", x " << name(format) << ", "
                                        << every);
      Layer layer(random, 40, 67, 45, 5, kind, format, random.pick(kForms));
      const auto has_gradient = [&](std::int64_t row) {
        return every == 40 ? row < 30 : every > 0 && row % every == 0;
      };
      Dense dy = layer.dy.values();
      for (std::int64_t row = 0; row < dy.rows; ++row) {
        for (std::int64_t j = 0; j < dy.cols; ++j) dy(row, j) = has_gradient(row) && j % 2 == 1 ? dy(row, j) : 0;
      }
      layer.dy = Stored(dy, format);
      check(layer, format);
      if constexpr (FindsZeroRows<decltype(backend())>) {
        const Outputs expected(backend(), layer, format);
        Dense x = layer.x.values();
        for (std::int64_t row = 0; row < x.rows; ++row) {
          for (std::int64_t j = 0; j < x.cols; ++j) x(row, j) = has_gradient(row) ? x(row, j) : kNotANumber;
        }
        layer.x = Stored(x, format);
        const Outputs found(backend(), layer, format);
        EXPECT_TRUE(found.dx.bytes() == expected.dx.bytes());
        EXPECT_TRUE(found.grad_a.bytes() == expected.grad_a.bytes());
        EXPECT_TRUE(found.grad_b.bytes() == expected.grad_b.bytes());
      }
    }
  }
}

// The loss sum(dy * y) is linear in every single parameter, so central differences of any step are exact.
Dense central_differences(Exact& exact, Dense Exact::* parameter, const Dense& dy) {
  const auto loss = [&] {
    const Dense y = exact.y();
    double sum = 0;
    for (std::size_t i = 0; i < y.values.size(); ++i) sum += dy.values[i] * y.values[i];
    return sum;
  };
  Dense gradient = exact.*parameter;
  for (std::size_t i = 0; i < gradient.values.size(); ++i) {
    double& value = (exact.*parameter).values[i];
    const double start = value;
    value = start + 1;
    const double above = loss();
    value = start - 1;
    gradient.values[i] = (above - loss()) / 2;
    value = start;
  }
  return gradient;
}

TEST_P(LinearTest, GradientsAreCentralDifferencesOfTheLayer) {
  Random random(4);
  for (const Kind kind : kKinds) {
    SCOPED_TRACE(static_cast<int>(kind));
    const Layer layer(random, 4, 9, 7, 2, kind, Format::f32, Form::nf4);
    const Outputs outputs(backend(), layer, Format::f32);
    Exact exact(layer);
    const Dense dy = layer.dy.values();
    expect_gradients_close(outputs, layer, central_differences(exact, &Exact::x, dy),
                           central_differences(exact, &Exact::delta_a, dy),
                           central_differences(exact, &Exact::delta_b, dy));
  }
}

TEST_P(LinearTest, ZeroDeltasOnAnImplicitResidualAreTheBaseBitForBit) {
  Random random(5);
  for (const Format format : kFloatFormats) {
    Layer layer(random, 6, 70, 40, 4, Kind::implicit, format, static_cast<Form>(format));
    layer.delta_a = Stored(Dense(4, 70), Format::f32);
    layer.delta_b = Stored(Dense(40, 4), Format::f32);
    const Outputs with(backend(), layer, format);
    layer.kind = Kind::none;
    const Outputs without(backend(), layer, format);
    EXPECT_TRUE(with.y.bytes() == without.y.bytes());
    EXPECT_TRUE(with.dx.bytes() == without.dx.bytes());
  }
}

TEST_P(LinearTest, WithoutDxTheOtherGradientsAreTheSame) {
  Random random(6);
  for (const Kind kind : {Kind::lora, Kind::stored, Kind::implicit}) {
    const Layer layer(random, 6, 20, 40, 4, kind, Format::bf16, Form::f16);
    const Outputs outputs(backend(), layer, Format::bf16);
    Stored grad_a = Stored::poisoned(4, 20, Format::f32);
    Stored grad_b = Stored::poisoned(40, 4, Format::f32);
    auto cpu = backend();
    linear_backward(cpu, layer.dy.view(), layer.x.view(), layer.weight.view(), layer.adapter(), outputs.xa.view(), {},
                    grad_a.mutable_view(), grad_b.mutable_view());
    EXPECT_TRUE(grad_a.bytes() == outputs.grad_a.bytes());
    EXPECT_TRUE(grad_b.bytes() == outputs.grad_b.bytes());
  }
}

TEST_P(LinearTest, TheSameBits) {
  Random random(7);
  for (const Kind kind : kKinds) {
    const Layer layer(random, 50, 300, 150, 9, kind, Format::bf16, Form::nf4_nested);
    expect_same_bits([&](auto& cpu) {
      const Outputs outputs(cpu, layer, Format::bf16);
      return outputs.bits();
    });
  }
}

// A factor in half precision is its sum, rounded once, whoever keeps it.
TEST_P(LinearTest, KeptSumsChangeNoBit) {
  Random random(8);
  for (const Kind kind : kKinds) {
    for (const Format format : kFloatFormats) {
      for (const std::int64_t tokens : {16, 17, 40}) {
        SCOPED_TRACE(::testing::Message()
                     << "kind " << static_cast<int>(kind) << ", x " << name(format) << ", tokens " << tokens);
        const Layer layer(random, tokens, 67, 45, 5, kind, format, Form::nf4);
        EXPECT_TRUE(Outputs(backend(), layer, format).bits() == Outputs(backend(), layer, format, false).bits());
      }
    }
  }
}

PISSA_EVERY_BACKEND(LinearTest);

}  // namespace
}  // namespace pissa::test
