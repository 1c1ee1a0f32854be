// cuda::split_many: weights of one shape side by side, as a stack, with the factors that each alone would get.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/split.h"
#include "pissa/cuda/backend.h"
#include "pissa/cuda/elementwise.h"
#include "pissa/cuda/products.h"
#include "pissa/cuda/split_many.h"
#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"
#include "support/split_layer.h"
#include "support/weight_classes.h"

namespace pissa::test {
namespace {

Dense product_of(const SplitLayer& layer) { return double{layer.scaling} * (layer.b0.values() * layer.a0.values()); }

void split_stack(std::deque<SplitLayer>& layers, std::int64_t stack_bytes = cuda::kStackBytes) {
  split_on_device(layers, cuda::standalone_context(), {SvdMethod::krylov, 12, 5}, {}, stack_bytes);
}

// The residual is as small as the weight's own decomposition leaves it. (Factors themselves may differ where singular
// values are close.)
void expect_split(const SplitLayer& layer) {
  const Dense w = layer.weight.values();
  const std::int64_t r = layer.a0.values().rows;
  const Svd exact = jacobi_svd(w);
  Dense tail(1, static_cast<std::int64_t>(exact.s.size()) - r);
  std::copy(exact.s.begin() + r, exact.s.end(), tail.values.begin());
  const double noise = 16 * kEps32 * std::sqrt(static_cast<double>(std::max(w.rows, w.cols))) * norm(w);
  EXPECT_LE(norm(w - product_of(layer)), 1.001 * norm(tail) + noise + 0x1p-149 * static_cast<double>(w.rows * w.cols));
  EXPECT_TRUE(layer.a0.padding_intact() && layer.b0.padding_intact() && layer.s.padding_intact());
  EXPECT_NEAR(norm(layer.s.values()), norm(product_of(layer)), noise);
}

class StackTest : public BackendTest {};

TEST_P(StackTest, MixedShapesRanksAndTypes) {
  Random random(1);
  std::deque<SplitLayer> layers;
  for (int i = 0; i < 12; ++i) {
    const auto spectrum = [](std::int64_t j) { return std::pow(j + 1.0, -1.0); };
    const bool wide = i % 2 == 0;
    layers.emplace_back(with_spectrum(random, wide ? 40 : 60, wide ? 60 : 40, spectrum), kFloatFormats.begin()[i % 3],
                        1 + i / 6, 0.5f + static_cast<float>(i));
  }
  split_stack(layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    SCOPED_TRACE(i);
    expect_split(layers[i]);
  }
}

TEST_P(StackTest, TheSameOneByOneOrTogether) {
  for (const auto& [format, rows, cols] :
       {std::tuple{Format::bf16, 50, 70}, {Format::f32, 50, 70}, {Format::f32, 70, 50}}) {
    std::vector<std::vector<Dense>> products(3);
    for (std::size_t run = 0; run < 3; ++run) {
      Random random(2);
      std::deque<SplitLayer> layers;
      for (int i = 0; i < 6; ++i) {
        layers.emplace_back(random.dense(rows, cols), i == 3 ? Format::f32 : format, 4, 2.0f + static_cast<float>(i));
      }
      split_stack(layers, std::int64_t{run == 0 ? 1 << 30 : run == 1 ? 1 : 2000000});
      for (const SplitLayer& layer : layers) products[run].push_back(product_of(layer));
    }
    for (std::size_t i = 0; i < 6; ++i) {
      const double tolerance = 64 * kEps32 * norm(products[0][i]);
      EXPECT_LE(norm(products[1][i] - products[0][i]), tolerance);
      EXPECT_LE(norm(products[2][i] - products[0][i]), tolerance);
    }
  }
}

// One weight without full rank goes the careful way, alone; it spoils no other.
TEST_P(StackTest, WeightsWithoutFullRankAmongOthers) {
  Random random(3);
  std::deque<SplitLayer> layers;
  layers.emplace_back(random.dense(30, 44), Format::f32, 5, 1.0f);
  layers.emplace_back(Dense(30, 44), Format::f32, 5, 1.0f);
  layers.emplace_back(random.dense(30, 2) * random.dense(2, 44), Format::f32, 5, 1.0f);
  layers.emplace_back(random.dense(30, 44), Format::f32, 5, 1.0f);
  split_stack(layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    SCOPED_TRACE(i);
    expect_split(layers[i]);
  }
}

// Magnitudes that no common power of two would bring into f32's range.
TEST_P(StackTest, WeightsOfVeryDifferentMagnitude) {
  Random random(4);
  const Dense w = with_spectrum(random, 30, 44, [](std::int64_t i) { return std::pow(i + 1.0, -1.0); });
  std::deque<SplitLayer> layers;
  for (const double magnitude : {1.0, 1e-30, 1e30, 1e-3, 1e-37, 300.0}) {
    layers.emplace_back(magnitude * w, Format::f32, 3, 1.0f);
  }
  split_stack(layers);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    SCOPED_TRACE(i);
    expect_split(layers[i]);
  }
}

TEST_P(StackTest, ErrorsNameTheWeightAndNothingIsWritten) {
  Random random(5);
  for (const bool infinite : {false, true}) {
    std::deque<SplitLayer> layers;
    for (int i = 0; i < 3; ++i) layers.emplace_back(random.dense(20, 30), Format::f32, 2, 1.0f);
    Dense bad = random.dense(20, 30);
    if (infinite) bad(7, 9) = std::numeric_limits<double>::infinity();
    layers.emplace_back(bad, Format::f32, 2, infinite ? 1.0f : -1.0f);
    try {
      split_stack(layers);
      ADD_FAILURE() << "accepted";
    } catch (const std::invalid_argument& error) {
      const std::string expected = infinite ? "weights[3]: weight: contains NaN" : "weights[3]: scaling: got -1";
      EXPECT_EQ(std::string(error.what()).rfind(expected, 0), 0u) << error.what();
    }
    for (const SplitLayer& layer : layers) EXPECT_TRUE(std::isnan(layer.a0.values()(0, 0)));
  }
  const cuda::Context& context = cuda::standalone_context();
  EXPECT_NO_THROW(cuda::split_many({}, {}, context));
}

// A row that keeps a millionth of its length outside the rows before it, wherever it is.
TEST_P(StackTest, NearlyDependentRowsAreFound) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(9);
  cuda::CudaBackend cuda(context);
  for (const std::int64_t row : {0, 1, 31, 32, 39}) {
    Dense values = random.dense(40, 60);
    for (std::int64_t j = 0; row > 0 && j < 60; ++j) values(row, j) = values(0, j) + 1e-6 * values(row, j);
    Stored rows(values, Format::f32);
    Staging at(context);
    cuda.orthonormalize(at(rows.mutable_view()), 0, 40, Rank::assumed_full);
    EXPECT_EQ(cuda.had_full_rank(), row == 0) << row;
  }
}

// Of `count` matrices one below the other, as a stack.
template <class M>
M stacked(M matrix, std::int64_t count) {
  matrix.rows /= count;
  matrix.stride = matrix.rows * matrix.ld;
  return matrix;
}

// Each matrix of a stack gets what it gets alone.
TEST_P(StackTest, ScalesTheRowsOfEachMatrix) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(6);
  const std::int64_t count = 3, rows = 5, cols = 11;
  const Stored a(random.dense(count * rows, cols), Format::f32);
  const Stored s(absolute(random.dense(count, rows)), Format::f32);
  for (const Op op : {Op::n, Op::t}) {
    const std::int64_t height = op == Op::n ? rows : cols;
    Stored out = Stored::poisoned(count * height, rows + cols - height, Format::f32);
    Stored expected = out;
    Staging at(context);
    cuda::scale_rows(context, stacked(at(a.view()), count), stacked(at(s.view()), count), 0.7f,
                     stacked(at(out.mutable_view()), count), op, count);
    at.finish();
    for (std::int64_t i = 0; i < count; ++i) {
      backend().scale_rows(rows_of(a.view(), i * rows, rows), rows_of(s.view(), i, 1), 0.7f,
                           rows_of(expected.mutable_view(), i * height, height), op);
    }
    EXPECT_TRUE(out.bytes() == expected.bytes());
  }
}

// One term, which is scaled and rounded, and two, which become one; each with a factor that all matrices share.
TEST_P(StackTest, MultipliesEachMatrix) {
  const cuda::Context& context = cuda::standalone_context();
  Random random(7);
  const std::int64_t count = 3, m = 20, n = 30, k = 6;
  const Stored a(random.dense(count * m, k), Format::f32), b(random.dense(k, n), Format::f32);
  const Stored c(random.dense(m, k), Format::f32), d(random.dense(count * k, n), Format::f32);
  const Stored addend(random.dense(count * m, n), Format::bf16);
  for (const std::size_t terms : {1, 2}) {
    Stored out = Stored::poisoned(count * m, n, Format::f32);
    Stored expected = out;
    Staging at(context);
    const std::vector<Term> all{{stacked(at(a.view()), count), Op::n, at(b.view()), Op::n, -0.3f, Precision::bf16},
                                {at(c.view()), Op::n, stacked(at(d.view()), count), Op::n, 0.7f, Precision::bf16}};
    cuda::sum_of_products(context, std::span(all).subspan(2 - terms), stacked(at(addend.view()), count),
                          stacked(at(out.mutable_view()), count), count);
    at.finish();
    for (std::int64_t i = 0; i < count; ++i) {
      const std::vector<Term> alone{{rows_of(a.view(), i * m, m), Op::n, b.view(), Op::n, -0.3f, Precision::bf16},
                                    {c.view(), Op::n, rows_of(d.view(), i * k, k), Op::n, 0.7f, Precision::bf16}};
      backend().gemm(std::span(alone).subspan(2 - terms), rows_of(addend.view(), i * m, m),
                     rows_of(expected.mutable_view(), i * m, m));
    }
    EXPECT_LE(norm(out.values() - expected.values()), 64 * kEps32 * norm(expected.values())) << terms;
    EXPECT_TRUE(out.padding_intact());
  }
}

PISSA_EVERY_BACKEND(StackTest);

}  // namespace
}  // namespace pissa::test
