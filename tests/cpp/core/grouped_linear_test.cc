// The layers of a group at once, against the formula in float64; and, where a backend has kernels for a group, bit for
// bit as the products of each tile of rows by itself.
#include "pissa/core/grouped_linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "support/backend_test.h"
#include "support/layer.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

using Rows = std::vector<std::int64_t>;

Stored aligned(const Dense& values, Format format) {
  return Stored(values, format, Stored::kAligned - values.cols % Stored::kAligned, Stored::kAligned);
}

/// Layers of random weights, factors and inputs.
template <class Weight>
struct Group {
  std::int64_t total = 0, in, out, r;
  Format format;
  std::vector<Weight> weights;
  std::vector<Stored> a, b, a0, b0;
  Stored x, dy;
  std::vector<GroupedLayer> layers;

  template <class Make>
  Group(Random& random, const Rows& rows, std::int64_t r_, Format format_, bool starts, Make make)
      : r(r_), format(format_), x(Dense(), format), dy(Dense(), format) {
    for (std::size_t i = 0; i < rows.size(); ++i) weights.push_back(make(random));
    in = weights[0].view().cols, out = weights[0].view().rows;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (auto* as : {&a, &a0}) as->push_back(Stored(random.dense(r, in), Format::f32));
      for (auto* bs : {&b, &b0}) bs->push_back(Stored(random.dense(out, r), Format::f32));
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
      Adapter adapter{a[i].view(), b[i].view(), {}, {}, 0.5f};
      if (starts) adapter.a0 = a0[i].view(), adapter.b0 = b0[i].view();
      layers.push_back({weights[i].view(), adapter, total, rows[i]});
      total += rows[i];
    }
    x = aligned(random.dense(total, in), format);
    dy = aligned(random.dense(total, out), format);
  }

  Dense rows_of(const Dense& values, const GroupedLayer& layer) const {
    Dense result(layer.rows, values.cols);
    for (std::int64_t i = 0; i < layer.rows; ++i)
      for (std::int64_t j = 0; j < values.cols; ++j) result(i, j) = values(layer.first + i, j);
    return result;
  }
  /// x W^T + s (x A^T) B^T of all rows, or of their absolute values.
  Dense y(Dense (*of)(Dense)) const {
    Dense result(total, out);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const GroupedLayer& layer = layers[i];
      Dense sum_a = of(a[i].values()), sum_b = of(b[i].values());
      if (layer.adapter.a0) sum_a = sum_a + of(a0[i].values()), sum_b = sum_b + of(b0[i].values());
      const Dense part = of(rows_of(x.values(), layer));
      const Dense y =
          part * transposed(of(weights[i].values())) + 0.5 * ((part * transposed(sum_a)) * transposed(sum_b));
      std::copy(y.values.begin(), y.values.end(), result.values.begin() + layer.first * out);
    }
    return result;
  }
};

Dense as_it_is(Dense a) { return a; }

const Rows kManySizes = {0, 1, 16, 0, 17, 64, 65, 128, 0};

class GroupedLinearTest : public BackendTest {
 protected:
  template <class Make>
  void check(Random& random, const Rows& rows, Format format, bool starts, Make make) const {
    const Group<decltype(make(random))> group(random, rows, 5, format, starts, make);
    SCOPED_TRACE(::testing::Message() << "x " << name(format) << ", weight " << name(group.layers[0].weight.format)
                                      << ", rows " << ::testing::PrintToString(rows) << ", starts " << starts);
    Stored y = Stored::poisoned(group.total, group.out, format);
    Stored xa = Stored::poisoned(group.total, group.r, Format::f32);
    auto device = backend();
    grouped_linear_forward(device, group.x.view(), group.layers, y.mutable_view(), xa.mutable_view());
    expect_close(y, {group.y(as_it_is), group.y(absolute)}, 2 * group.in + 2 * group.r + kFew, bf16_roundings(format));
    if constexpr (MultipliesGroups<decltype(device)>) expect_bits_of_tiles(group, y, xa);
    expect_gradients_of_layers(group, xa);
  }

  // What two kernels compute for all is what they do for 16 rows, and for 64.
  template <class G>
  void expect_bits_of_tiles(const G& group, const Stored& y, const Stored& xa) const {
    const Precision precision = precision_of(group.format);
    if (precision == Precision::tf32) return;
    Stored expected_y = Stored::poisoned(group.total, group.out, group.format);
    Stored expected_xa = Stored::poisoned(group.total, group.r, Format::f32);
    for (const GroupedLayer& layer : group.layers) {
      const Adapter& adapter = layer.adapter;
      const auto product = [&](const Matrix& of, const Matrix& start, const Matrix& delta, float scale) {
        std::vector<Term> terms;
        if (start) terms.push_back({of, Op::n, start, Op::t, scale, precision});
        terms.push_back({of, Op::n, delta, Op::t, scale, precision});
        return terms;
      };
      for (std::int64_t i = 0; i < layer.rows; i += 16) {
        const std::int64_t first = layer.first + i, count = std::min<std::int64_t>(layer.rows - i, 16);
        backend().gemm(product(rows_of(group.x.view(), first, count), adapter.a0, adapter.a, 1.0f), {},
                       rows_of(expected_xa.mutable_view(), first, count));
      }
      for (std::int64_t i = 0; i < layer.rows; i += 64) {
        const std::int64_t first = layer.first + i, count = std::min<std::int64_t>(layer.rows - i, 64);
        backend().weight_gemm_nt(rows_of(group.x.view(), first, count), layer.weight, 1.0f, precision,
                                 product(rows_of(xa.view(), first, count), adapter.b0, adapter.b, adapter.scaling), {},
                                 rows_of(expected_y.mutable_view(), first, count));
      }
    }
    EXPECT_TRUE(xa.bytes() == expected_xa.bytes());
    EXPECT_TRUE(y.bytes() == expected_y.bytes());
  }

  template <class G>
  void expect_gradients_of_layers(const G& group, const Stored& xa) const {
    Stored dx = Stored::poisoned(group.total, group.in, group.format), expected_dx = dx;
    std::vector<Stored> grads, expected;
    std::vector<MutableMatrix> grads_a, grads_b;
    for (std::size_t i = 0; i < group.layers.size(); ++i) {
      grads.push_back(Stored::poisoned(group.r, group.in, Format::f32));
      grads.push_back(Stored::poisoned(group.out, group.r, Format::f32));
    }
    expected = grads;
    for (std::size_t i = 0; i < grads.size(); i += 2) {
      grads_a.push_back(grads[i].mutable_view());
      grads_b.push_back(grads[i + 1].mutable_view());
    }
    auto device = backend();
    grouped_linear_backward(device, group.dy.view(), group.x.view(), group.layers, xa.view(), dx.mutable_view(),
                            grads_a, grads_b);
    for (std::size_t i = 0; i < group.layers.size(); ++i) {
      const GroupedLayer& layer = group.layers[i];
      linear_backward(device, layer.part(group.dy.view()), layer.part(group.x.view()), layer.weight, layer.adapter,
                      layer.part(xa.view()), layer.rows ? layer.part(expected_dx.mutable_view()) : MutableMatrix{},
                      expected[2 * i].mutable_view(), expected[2 * i + 1].mutable_view());
      for (const std::size_t j : {2 * i, 2 * i + 1}) {
        EXPECT_TRUE(grads[j].bytes() == expected[j].bytes());
        EXPECT_EQ(norm(grads[j].values()) > 0, layer.rows > 0);
      }
    }
    EXPECT_TRUE(dx.bytes() == expected_dx.bytes());
  }
};

TEST_P(GroupedLinearTest, EveryFormat) {
  Random random(1);
  for (const Format format : kFloatFormats) {
    for (const Rows& rows : {Rows{1, 16, 0, 7}, kManySizes}) {
      const bool starts = rows.size() > 4 || random.coin();
      check(random, rows, format, starts, [](Random& r) { return StoredNf4(r, 21, 160, 64, true); });
      check(random, rows, format, !starts, [](Random& r) { return StoredNf4(r, 21, 160, 32, false); });
      check(random, rows, format, starts, [](Random& r) { return StoredInt8(r, 21, 160); });
      check(random, rows, format, starts, [](Random& r) { return StoredLevels(r, Format::nvfp4, 21, 160, 16, false); });
      check(random, rows, format, starts, [](Random& r) { return StoredFp8(r, 21, 160, 1, 32, ScaleKind::e8m0); });
    }
  }
}

// Where the block shares a row of A; many layers; ranks of several chunks of the tail.
TEST_P(GroupedLinearTest, LongRowsAndManyLayers) {
  Random random(2);
  check(random, {3, 0, 40}, Format::bf16, true, [](Random& r) { return StoredNf4(r, 17, 1056, 64, true); });
  Rows many(150, 1);
  many[7] = many[149] = 0, many[140] = 18;
  check(random, many, Format::f16, true, [](Random& r) { return StoredNf4(r, 3, 32, 64, false); });
}

#if defined(PISSA_TEST_CUDA)
// Which the random scales have not.
TEST_P(GroupedLinearTest, EveryLayerHasTheOffsetOfItsNestedScales) {
  Random random(4);
  Group<StoredNf4> group(random, {2, 3}, 3, Format::bf16, true,
                         [](Random& r) { return StoredNf4(r, 8, 64, 64, true); });
  const float offset = 3.0f;
  group.layers[1].weight.scales.offset = &offset;
  Stored y = Stored::poisoned(group.total, 8, Format::bf16), xa = Stored::poisoned(group.total, 3, Format::f32);
  ASSERT_TRUE(backend().multiply_group(group.x.view(), group.layers, y.mutable_view(), xa.mutable_view()));
  expect_bits_of_tiles(group, y, xa);
}

TEST_P(GroupedLinearTest, WhatItsKernelsCannotTakeIsLeftToOthers) {
  Random random(3);
  const auto taken = [&](const Rows& rows, Format format, std::int64_t in, auto change) {
    Group<StoredNf4> group(random, rows, 3, format, true, [&](Random& r) { return StoredNf4(r, 8, in, 32, false); });
    change(group);
    Stored y = Stored::poisoned(group.total, 8, format), xa = Stored::poisoned(group.total, 3, Format::f32);
    return backend().multiply_group(group.x.view(), group.layers, y.mutable_view(), xa.mutable_view());
  };
  const auto as_it_is = [](auto&) {};
  EXPECT_TRUE(taken({2, 128}, Format::bf16, 64, as_it_is));
  EXPECT_FALSE(taken({2, 129}, Format::bf16, 64, as_it_is));
  EXPECT_FALSE(taken({2, 1}, Format::f32, 64, as_it_is));
  EXPECT_FALSE(taken({2, 1}, Format::f16, 48, as_it_is));
  EXPECT_FALSE(taken({2, 1}, Format::f16, 64, [](auto& group) {
    group.a[1] = Stored(group.a[1].values(), Format::f32, 4);
    group.layers[1].adapter.a = group.a[1].view();
  }));
}
#endif

PISSA_EVERY_BACKEND(GroupedLinearTest);

}  // namespace
}  // namespace pissa::test
