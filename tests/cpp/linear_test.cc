// The linear layer with its adapter, forward and backward, against the paper's formulas in float64.
#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "isa_test.h"
#include "matrices.h"
#include "pissa/fused_linear.h"
#include "reference.h"

namespace pissa::test {
namespace {

enum class Kind { none, lora, stored, implicit };
constexpr std::initializer_list<Kind> kKinds = {Kind::none, Kind::lora, Kind::stored, Kind::implicit};

/// A layer, an input and an output gradient.
struct Layer {
  std::int64_t tokens, in, out, r;
  Kind kind;
  float s;
  Operand x, dy, weight, bias, delta_a, delta_b, a0, b0;
  bool with_bias;

  Layer(Random& random, std::int64_t tokens_, std::int64_t in_, std::int64_t out_, std::int64_t r_, Kind kind_,
        Codec codec, Form weight_form)
      : tokens(tokens_),
        in(in_),
        out(out_),
        r(r_),
        kind(kind_),
        s(random.pick({1.0f, 0.5f, 2.0f, 5.65685f})),
        x(random, tokens, in, static_cast<Form>(codec)),
        dy(random, tokens, out, static_cast<Form>(codec)),
        weight(random, out, in, weight_form),
        bias(random, 1, out, static_cast<Form>(codec)),
        delta_a(random, r, in, Form::f32),
        delta_b(random, out, r, Form::f32),
        a0(random, r, in, Form::f32),
        b0(random, out, r, Form::f32),
        with_bias(random.coin()) {}

  Adapter adapter() const {
    if (kind == Kind::none) return {};
    Adapter result{
        delta_a.view(), delta_b.view(), {}, {}, s, kind == Kind::implicit ? Residual::implicit : Residual::stored};
    if (kind != Kind::lora) {
      result.a0 = a0.view();
      result.b0 = b0.view();
    }
    return result;
  }
};

/// The layer's matrices in float64; kinds without a part have zeros in its place.
struct Exact {
  Dense x, weight, bias, delta_a, delta_b, a0, b0;
  double s;
  bool implicit;

  explicit Exact(const Layer& layer)
      : x(layer.x.values()),
        weight(layer.weight.values()),
        bias(1, layer.out),
        delta_a(layer.r, layer.in),
        delta_b(layer.out, layer.r),
        a0(layer.r, layer.in),
        b0(layer.out, layer.r),
        s(layer.s),
        implicit(layer.kind == Kind::implicit) {
    if (layer.with_bias) bias = layer.bias.values();
    if (layer.kind != Kind::none) {
      delta_a = layer.delta_a.values();
      delta_b = layer.delta_b.values();
    }
    if (layer.kind == Kind::stored || layer.kind == Kind::implicit) {
      a0 = layer.a0.values();
      b0 = layer.b0.values();
    }
  }

  Dense a() const { return a0 + delta_a; }
  Dense b() const { return b0 + delta_b; }
  /// The paper's frozen residual: what is stored, or, of an implicit residual, the weight less its principal part.
  Dense residual() const { return implicit ? weight - s * (b0 * a0) : weight; }
  /// PiSSA's layer, y = x W_res^T + s x A^T B^T + bias, whatever the form in which it is computed.
  Dense y() const { return x * transposed(residual()) + s * ((x * transposed(a())) * transposed(b())) + bias; }

  Dense dx(const Dense& dy) const { return dy * residual() + s * ((dy * b()) * a()); }
  Dense grad_a(const Dense& dy) const { return s * (transposed(dy * b()) * x); }
  Dense grad_b(const Dense& dy) const { return s * (transposed(dy) * (x * transposed(a()))); }
};

/// The same expressions of absolute values, in the form in which they are computed.
struct Magnitude {
  Dense x, dy, weight, bias, delta_a, delta_b, a0, b0;
  double s;
  bool implicit;

  Magnitude(const Exact& exact, const Dense& dy_)
      : x(absolute(exact.x)),
        dy(absolute(dy_)),
        weight(absolute(exact.weight)),
        bias(absolute(exact.bias)),
        delta_a(absolute(exact.delta_a)),
        delta_b(absolute(exact.delta_b)),
        a0(absolute(exact.a0)),
        b0(absolute(exact.b0)),
        s(exact.s),
        implicit(exact.implicit) {}

  Dense a() const { return a0 + delta_a; }
  Dense b() const { return b0 + delta_b; }
  Dense xa() const { return x * transposed(a()); }
  Dense y() const {
    const Dense tail =
        implicit ? xa() * transposed(delta_b) + (x * transposed(delta_a)) * transposed(b0) : xa() * transposed(b());
    return x * transposed(weight) + s * tail + bias;
  }
  Dense dx() const {
    return dy * weight + s * (implicit ? (dy * delta_b) * a() + (dy * b0) * delta_a : (dy * b()) * a());
  }
  Dense grad_a() const { return s * (transposed(dy * b()) * x); }
  Dense grad_b() const { return s * (transposed(dy) * xa()); }
};

/// What the backend computes.
struct Outputs {
  Stored y, xa, dx, grad_a, grad_b;

  Outputs(const cpu::CpuBackend& backend, const Layer& layer, Codec codec)
      : y(Stored::poisoned(layer.tokens, layer.out, codec)),
        xa(Stored::poisoned(layer.tokens, layer.r, Codec::f32)),
        dx(Stored::poisoned(layer.tokens, layer.in, codec)),
        grad_a(Stored::poisoned(layer.r, layer.in, Codec::f32)),
        grad_b(Stored::poisoned(layer.out, layer.r, Codec::f32)) {
    linear_forward(backend, layer.x.view(), layer.weight.view(), layer.with_bias ? layer.bias.view() : Matrix{},
                   layer.adapter(), y.mutable_view(), xa.mutable_view());
    linear_backward(backend, layer.dy.view(), layer.x.view(), layer.weight.view(), layer.adapter(), xa.view(),
                    dx.mutable_view(), grad_a.mutable_view(), grad_b.mutable_view());
  }
};

// Roundings along the longest chain of each result: the inner dimensions, and a few for sums, scaling and bias.
constexpr std::int64_t kFew = 10;

void expect_gradients_close(const Outputs& outputs, const Layer& layer, const Dense& dx, const Dense& grad_a,
                            const Dense& grad_b) {
  const Magnitude magnitude(Exact(layer), layer.dy.values());
  expect_close(outputs.dx, {dx, magnitude.dx()}, 2 * layer.out + 2 * layer.r + kFew);
  if (layer.kind == Kind::none) return;
  expect_close(outputs.grad_a, {grad_a, magnitude.grad_a()}, layer.out + layer.tokens + kFew);
  expect_close(outputs.grad_b, {grad_b, magnitude.grad_b()}, layer.in + layer.tokens + kFew);
}

class LinearTest : public IsaTest {
 protected:
  void check(const Layer& layer, Codec codec) const {
    const Outputs outputs(backend(), layer, codec);
    const Exact exact(layer);
    const Dense dy = layer.dy.values();
    const Magnitude magnitude(exact, dy);
    expect_close(outputs.y, {exact.y(), magnitude.y()}, 2 * layer.in + 2 * layer.r + kFew);
    if (layer.kind != Kind::none) {
      expect_close(outputs.xa, {exact.x * transposed(exact.a()), magnitude.xa()}, layer.in + kFew);
    }
    expect_gradients_close(outputs, layer, exact.dx(dy), exact.grad_a(dy), exact.grad_b(dy));
  }
};

TEST_P(LinearTest, EveryKindAndCodec) {
  Random random(1);
  for (const Kind kind : kKinds) {
    for (const Codec codec : kCodecs) {
      for (const Form weight : kForms) {
        SCOPED_TRACE(::testing::Message()
                     << "kind " << static_cast<int>(kind) << ", x " << name(codec) << ", weight " << name(weight));
        check(Layer(random, 5, 43, 37, 3, kind, codec, weight), codec);
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
      const Codec codec = random.pick(kCodecs);
      check(Layer(random, tokens, in, out, r, kind, codec, random.pick(kForms)), codec);
    }
  }
}

// No tokens: empty outputs, and gradients of the adapter that are zero, not left as they were.
TEST_P(LinearTest, ZeroTokensGiveZeroGradients) {
  Random random(3);
  for (const Kind kind : {Kind::lora, Kind::stored, Kind::implicit}) {
    const Layer layer(random, 0, 13, 11, 3, kind, Codec::f32, Form::bf16);
    const Outputs outputs(backend(), layer, Codec::f32);
    EXPECT_EQ(outputs.grad_a.values().values, std::vector<double>(3 * 13, 0.0));
    EXPECT_EQ(outputs.grad_b.values().values, std::vector<double>(11 * 3, 0.0));
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
    const Layer layer(random, 4, 9, 7, 2, kind, Codec::f32, Form::nf4);
    const Outputs outputs(backend(), layer, Codec::f32);
    Exact exact(layer);
    const Dense dy = layer.dy.values();
    expect_gradients_close(outputs, layer, central_differences(exact, &Exact::x, dy),
                           central_differences(exact, &Exact::delta_a, dy),
                           central_differences(exact, &Exact::delta_b, dy));
  }
}

TEST_P(LinearTest, ZeroDeltasOnAnImplicitResidualAreTheBaseBitForBit) {
  Random random(5);
  for (const Codec codec : kCodecs) {
    Layer layer(random, 6, 70, 40, 4, Kind::implicit, codec, static_cast<Form>(codec));
    layer.delta_a = Stored(Dense(4, 70), Codec::f32);
    layer.delta_b = Stored(Dense(40, 4), Codec::f32);
    const Outputs with(backend(), layer, codec);
    layer.kind = Kind::none;
    const Outputs without(backend(), layer, codec);
    EXPECT_TRUE(with.y.bytes() == without.y.bytes());
    EXPECT_TRUE(with.dx.bytes() == without.dx.bytes());
  }
}

TEST_P(LinearTest, WithoutDxTheOtherGradientsAreTheSame) {
  Random random(6);
  for (const Kind kind : {Kind::lora, Kind::stored, Kind::implicit}) {
    const Layer layer(random, 6, 20, 40, 4, kind, Codec::bf16, Form::f16);
    const Outputs outputs(backend(), layer, Codec::bf16);
    Stored grad_a = Stored::poisoned(4, 20, Codec::f32);
    Stored grad_b = Stored::poisoned(40, 4, Codec::f32);
    cpu::CpuBackend cpu = backend();
    linear_backward(cpu, layer.dy.view(), layer.x.view(), layer.weight.view(), layer.adapter(), outputs.xa.view(), {},
                    grad_a.mutable_view(), grad_b.mutable_view());
    EXPECT_TRUE(grad_a.bytes() == outputs.grad_a.bytes());
    EXPECT_TRUE(grad_b.bytes() == outputs.grad_b.bytes());
  }
}

TEST_P(LinearTest, BitwiseTheSameForAnyNumberOfThreads) {
  for (const Kind kind : kKinds) {
    std::unique_ptr<Outputs> expected;
    for (const int threads : {1, 2, 3, 7}) {
      Random random(7);
      const Layer layer(random, 50, 300, 150, 9, kind, Codec::bf16, Form::nf4_nested);
      const cpu::ThreadExecutor executor(threads);
      auto outputs = std::make_unique<Outputs>(cpu::CpuBackend(executor, kernels()), layer, Codec::bf16);
      if (!expected) expected = std::move(outputs);
      else {
        for (Stored Outputs::* part : {&Outputs::y, &Outputs::xa, &Outputs::dx, &Outputs::grad_a, &Outputs::grad_b}) {
          EXPECT_TRUE((*outputs.*part).bytes() == (*expected.*part).bytes()) << threads << " threads";
        }
      }
    }
  }
}

PISSA_EVERY_ISA(LinearTest);

}  // namespace
}  // namespace pissa::test
