// add_low_rank: the adapter's part on top of what any function returned, forward and backward.
#include <gtest/gtest.h>

#include <cstdint>

#include "pissa/core/fused_linear.h"
#include "support/backend_test.h"
#include "support/layer.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

class AddLowRankTest : public BackendTest {
 protected:
  void check(Random& random, const Layer& layer, Format base_format) const {
    Exact exact(layer);
    exact.weight = Dense(layer.out, layer.in);  // what remains is the adapter's part
    exact.bias = Dense(1, layer.out);
    const Dense dy = layer.dy.values();
    const Magnitude magnitude(exact, dy);
    const std::int64_t halves = bf16_roundings(layer.x.view().format);
    auto cpu = backend();

    const Stored base(random.dense(layer.tokens, layer.out), base_format);
    Stored y = Stored::poisoned(layer.tokens, layer.out, base_format);
    Stored xa = Stored::poisoned(layer.tokens, layer.r, Format::f32);
    KeptSums<decltype(cpu)> sums(layer.x.view(), layer.adapter());
    add_low_rank_forward(cpu, base.view(), layer.x.view(), layer.adapter(), y.mutable_view(), xa.mutable_view(),
                         sums.view);
    expect_close(y, {base.values() + exact.y(), absolute(base.values()) + magnitude.y()}, layer.in + 2 * layer.r + kFew,
                 halves);
    Stored in_place = base;
    add_low_rank_forward(cpu, in_place.view(), layer.x.view(), layer.adapter(), in_place.mutable_view(),
                         xa.mutable_view());
    EXPECT_EQ(in_place.values().values, y.values().values);

    Stored dx = Stored::poisoned(layer.tokens, layer.in, Format::f32);
    Stored grad_a = Stored::poisoned(layer.r, layer.in, Format::f32);
    Stored grad_b = Stored::poisoned(layer.out, layer.r, Format::f32);
    add_low_rank_backward(cpu, layer.dy.view(), layer.x.view(), layer.adapter(), xa.view(), dx.mutable_view(),
                          grad_a.mutable_view(), grad_b.mutable_view(), sums.view);
    expect_close(dx, {exact.dx(dy), magnitude.dx()}, layer.out + 2 * layer.r + kFew, halves);
    expect_close(grad_a, {exact.grad_a(dy), magnitude.grad_a()}, layer.out + layer.tokens + kFew, halves);
    expect_close(grad_b, {exact.grad_b(dy), magnitude.grad_b()}, layer.in + layer.tokens + kFew, halves);

    Stored again_a = Stored::poisoned(layer.r, layer.in, Format::f32);
    Stored again_b = Stored::poisoned(layer.out, layer.r, Format::f32);
    add_low_rank_backward(cpu, layer.dy.view(), layer.x.view(), layer.adapter(), xa.view(), {}, again_a.mutable_view(),
                          again_b.mutable_view());
    EXPECT_TRUE(again_a.bytes() == grad_a.bytes() && again_b.bytes() == grad_b.bytes()) << "without dx";
  }
};

TEST_P(AddLowRankTest, EveryKindAndFormat) {
  Random random(1);
  for (const Kind kind : {Kind::lora, Kind::stored, Kind::implicit}) {
    for (const Format x : kFloatFormats) {
      for (const Format base : kFloatFormats) {
        SCOPED_TRACE(::testing::Message()
                     << "kind " << static_cast<int>(kind) << ", x " << name(x) << ", base " << name(base));
        check(random, Layer(random, 6, 43, 37, 3, kind, x, Form::f32), base);
        check(random, Layer(random, 20, 17, 300, 1, kind, x, Form::f32), base);
      }
    }
  }
}

TEST_P(AddLowRankTest, ZeroDeltasOfAnImplicitResidualChangeNothing) {
  Random random(2);
  for (const Format format : kFloatFormats) {
    Layer layer(random, 5, 70, 40, 4, Kind::implicit, format, Form::f32);
    layer.delta_a = Stored(Dense(4, 70), Format::f32);
    layer.delta_b = Stored(Dense(40, 4), Format::f32);
    const Stored base(random.dense(5, 40), format);
    Stored y = Stored::poisoned(5, 40, format);
    Stored xa = Stored::poisoned(5, 4, Format::f32);
    auto cpu = backend();
    add_low_rank_forward(cpu, base.view(), layer.x.view(), layer.adapter(), y.mutable_view(), xa.mutable_view());
    EXPECT_EQ(y.values().values, base.values().values);
  }
}

PISSA_EVERY_BACKEND(AddLowRankTest);

}  // namespace
}  // namespace pissa::test
