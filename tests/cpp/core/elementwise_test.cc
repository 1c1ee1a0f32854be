// copy, add, subtract, scale_rows, max_abs.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "pissa/core/max_abs.h"
#include "support/backend_test.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {
namespace {

class ElementwiseTest : public BackendTest {
 protected:
  float max_abs_of(const Matrix& matrix) const {
    auto tested = backend();
    return max_abs(tested, matrix);
  }

  /// check(operand, out) for an operand of every form and an output of every format, of every shape.
  template <class Check>
  static void for_each_case(Random& random, Check check) {
    const std::pair<std::int64_t, std::int64_t> shapes[] = {{0, 5},    {5, 0},    {1, 1},    {3, 33},
                                                            {4, 1023}, {2, 1024}, {3, 1025}, {2, 2100}};
    for (const auto& [rows, cols] : shapes) {
      for (const Form form : kForms) {
        for (const Format format : kFloatFormats) {
          SCOPED_TRACE(::testing::Message() << rows << " x " << cols << ", " << name(form) << ", " << name(format));
          Stored out = Stored::poisoned(rows, cols, format);
          check(Operand(random, rows, cols, form), out);
          EXPECT_TRUE(out.padding_intact());
        }
      }
    }
  }
};

TEST_P(ElementwiseTest, CopyConvertsExactlyOrRounds) {
  Random random(1);
  for_each_case(random, [&](const Operand& a, Stored& out) {
    backend().copy(a.view(), out.mutable_view());
    EXPECT_EQ(out.values().values, Stored(a.values(), out.format()).values().values);
  });
}

TEST_P(ElementwiseTest, DecodesRowsOfAnyQuantizedFormat) {
  Random random(2);
  const std::int64_t rows[] = {5, 0, 5, 8, -1, 9};  // of nine: for the last two the first
  std::vector<Form> forms(kForms);
  forms.insert(forms.end(), gguf_forms().begin(), gguf_forms().end());
  for (const Form form : forms) {
    for (const std::int64_t cols : {37, 256, 1280}) {
      if (cols == 37 && is_read_only(static_cast<Format>(form))) continue;  // no whole block
      const Operand a(random, 9, cols, form);
      if (!is_quantized(a.view().format)) continue;
      SCOPED_TRACE(::testing::Message() << name(form) << ", " << cols);
      Stored out = Stored::poisoned(6, cols, Format::bf16);
      backend().decode_rows(a.view(), rows, out.mutable_view());
      Dense expected(6, cols);
      const Dense values = a.values();
      for (int i = 0; i < 6; ++i) {
        for (std::int64_t j = 0; j < cols; ++j) expected(i, j) = values(i < 4 ? rows[i] : 0, j);
      }
      EXPECT_EQ(out.values().values, Stored(expected, Format::bf16).values().values);
      EXPECT_TRUE(out.padding_intact());
    }
  }
}

// Every code of E4M3, and every byte of E8M0, NaN among them.
TEST_P(ElementwiseTest, CopiesEveryFp8Code) {
  std::vector<std::uint8_t> codes(256 * 256), scales(256);
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint8_t>(i % 256);
  for (std::size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<std::uint8_t>(i);
  Matrix matrix{codes.data(), 256, 256, 0, Format::fp8};
  matrix.scales.blocksize = 256;
  matrix.scales.absmax8 = scales.data();
  std::vector<float> out(256 * 256);
  backend().copy(matrix, {out.data(), 256, 256, 256, Format::f32});
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::size_t byte = i / 256, code = i % 256;
    if (byte == 255 || code % 128 == 127) {
      ASSERT_TRUE(std::isnan(out[i])) << byte << ", " << code;
    } else {
      const double scale = std::ldexp(1.0, static_cast<int>(byte) - 127);
      const auto expected = static_cast<float>(kE4m3.decode(static_cast<std::uint32_t>(code)) * scale);
      ASSERT_EQ(std::bit_cast<std::uint32_t>(out[i]), std::bit_cast<std::uint32_t>(expected)) << byte << ", " << code;
    }
  }
}

TEST_P(ElementwiseTest, AddRoundsOnce) {
  Random random(2);
  for_each_case(random, [&](const Operand& a, Stored& out) {
    const Operand b(random, a.view().rows, a.view().cols, Form::f32);
    backend().add(a.view(), b.view(), out.mutable_view());
    expect_close(out, {a.values() + b.values(), absolute(a.values()) + absolute(b.values())}, 1);
  });
}

TEST_P(ElementwiseTest, AddTakesMatricesWithoutGaps) {
  Random random(7);
  for (const Form form : kForms) {
    const Operand a(random, 4, 64, form), b(random, 4, 64, Form::f32);
    Stored out = Stored::poisoned(4, 64, Format::f32, 0);
    backend().add(a.view(), b.view(), out.mutable_view());
    expect_close(out, {a.values() + b.values(), absolute(a.values()) + absolute(b.values())}, 1);
  }
}

TEST_P(ElementwiseTest, AddWorksInPlace) {
  Random random(3);
  Stored a(random.dense(5, 1100), Format::f32);
  const Stored b(random.dense(5, 1100), Format::bf16);
  const Bounded expected{a.values() + b.values(), absolute(a.values()) + absolute(b.values())};
  backend().add(a.view(), b.view(), a.mutable_view());
  expect_close(a, expected, 1);
}

// The sum of the squares of what `out` holds, not of what it was rounded from; both sums are of n terms, in any order.
void expect_squares(double squares, const Stored& out) {
  double expected = 0;
  for (const double value : out.values().values) expected += value * value;
  const auto terms = static_cast<double>(out.values().values.size());
  EXPECT_NEAR(squares, expected, 2 * terms * 0x1p-53 * expected);
}

TEST_P(ElementwiseTest, SubtractRoundsOnceAndAddsUpTheSquares) {
  Random random(9);
  for_each_case(random, [&](const Operand& b, Stored& out) {
    const Stored a(random.dense(b.view().rows, b.view().cols), out.format());
    double squares = std::nan("");
    backend().subtract(a.view(), b.view(), out.mutable_view(), &squares);
    expect_close(out, {a.values() - b.values(), absolute(a.values()) + absolute(b.values())}, 1);
    expect_squares(squares, out);
  });
}

// A quantised matrix of more than a chunk is decoded in several; squares may be more than f32 holds.
TEST_P(ElementwiseTest, SubtractOfALargeMatrix) {
  Random random(10);
  const std::int64_t rows = 4200, cols = 2048;
  const Operand b(random, rows, cols, Form::nf4_nested);
  Dense values = b.values();
  for (std::int64_t i = 0; i < rows * cols; ++i) values.values[i] = i % 1000 == 0 ? 0x1p100 : 0;
  const Stored a(values, Format::bf16);
  Stored out = Stored::poisoned(rows, cols, Format::bf16);
  double squares = std::nan("");
  backend().subtract(a.view(), b.view(), out.mutable_view(), &squares);
  EXPECT_EQ(out.values().values, Stored(values - b.values(), Format::bf16).values().values);
  expect_squares(squares, out);
}

TEST_P(ElementwiseTest, ScaleRowsAlsoTransposed) {
  Random random(4);
  for (const auto& [rows, cols] : {std::pair{1, 1}, {3, 70}, {9, 4}}) {
    const Stored a(random.dense(rows, cols), Format::f32);
    const Stored s(absolute(random.dense(1, rows)), Format::f32);
    Dense expected = a.values();
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; ++j) expected(i, j) *= std::sqrt(s.values()(0, i) / 1.7f);
    }
    Stored straight = Stored::poisoned(rows, cols, Format::f32);
    backend().scale_rows(a.view(), s.view(), 1.7f, straight.mutable_view(), Op::n);
    expect_close(straight, bounded(expected), 3);
    Stored turned = Stored::poisoned(cols, rows, Format::f32);
    backend().scale_rows(a.view(), s.view(), 1.7f, turned.mutable_view(), Op::t);
    expect_close(turned, bounded(transposed(expected)), 3);
  }
}

// Exact but for the last rounding: each row by a power of two, however far from 1 it is.
TEST_P(ElementwiseTest, NormalizeRowsBringsEachNearOne) {
  Random random(8);
  for (const std::int64_t cols : {1, 7, 300, 1500}) {
    Dense values = random.dense(6, cols);
    const double scales[] = {1, 0x1p120, 0x1p-120, 0, 0x1p-10, -3};
    for (std::int64_t i = 0; i < 6 * cols; ++i) values.values[i] *= scales[i / cols];
    const Stored a(values, Format::f32);
    for (const Format format : kFloatFormats) {
      Stored out = Stored::poisoned(6, cols, format);
      backend().normalize_rows(a.view(), out.mutable_view());
      Dense expected = a.values();
      for (std::int64_t i = 0; i < 6; ++i) {
        double largest = 0;
        for (std::int64_t j = 0; j < cols; ++j) largest = std::max(largest, std::fabs(expected(i, j)));
        const int exponent = largest > 0 ? std::ilogb(largest) : 0;
        for (std::int64_t j = 0; j < cols; ++j) expected(i, j) = std::ldexp(expected(i, j), -exponent);
      }
      EXPECT_EQ(out.values().values, Stored(expected, format).values().values);
      EXPECT_TRUE(out.padding_intact());
    }
  }
}

TEST_P(ElementwiseTest, MaxAbsFindsTheLargestAnywhere) {
  for (std::int64_t cols = 1; cols <= 70; ++cols) {
    for (std::int64_t at = 0; at < cols; ++at) {
      Dense values(2, cols, 0.5);
      values(1, at) = at % 2 == 0 ? -3.25 : 3.25;
      EXPECT_EQ(max_abs_of(Stored(values, Format::f32).view()), 3.25f) << at << " of " << cols;
    }
  }
  Random random(5);
  for (const Form form : kForms) {
    const Operand a(random, 3, 2050, form);
    double largest = 0;
    for (const double value : a.values().values) largest = std::max(largest, std::fabs(value));
    EXPECT_EQ(max_abs_of(a.view()), largest) << name(form);
  }
}

// Of 130 matrices, more than a launch takes, each gets its own: whatever its form and size, and beside NaN.
TEST_P(ElementwiseTest, MaxAbsOfManyMatricesAtOnce) {
  Random random(7);
  std::vector<Operand> operands;
  std::vector<Matrix> matrices;
  std::vector<double> expected;
  operands.reserve(130);
  for (std::int64_t i = 0; i < 130; ++i) {
    const Form form = kForms.begin()[i % static_cast<std::int64_t>(kForms.size())];
    operands.emplace_back(random, 1 + i % 7, 32 + i * i % 301, form);
    matrices.push_back(operands.back().view());
    expected.push_back(0);
    for (const double value : operands.back().values().values) {
      expected.back() = std::max(expected.back(), std::fabs(value));
    }
  }
  Dense bad = random.dense(90, 1000);
  bad(0, 17) = std::nan("");  // 10000 elements and more before the last
  const Stored not_finite(bad, Format::f32);
  matrices[11] = not_finite.view();
  matrices[77] = Matrix{nullptr, 0, 7, 7, Format::bf16};
  expected[77] = 0;
  auto tested = backend();
  const std::vector<float> largest = max_abs(tested, matrices);
  ASSERT_EQ(largest.size(), matrices.size());
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    if (i == 11) EXPECT_TRUE(std::isnan(largest[i]));
    else EXPECT_EQ(largest[i], expected[i]) << i;
  }
}

// Any one element that is not finite, before or after larger ones, makes the result not finite.
TEST_P(ElementwiseTest, MaxAbsIsNotFiniteIfAnyElementIsNot) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const double special : {std::nan(""), kInf, -kInf}) {
    for (const std::int64_t cols : {1, 3, 16, 17, 40, 1030}) {
      for (std::int64_t at = 0; at < 3 * cols; at += cols > 100 ? 101 : 1) {
        Dense values(3, cols, 2);
        values.values[at] = special;
        for (const Format format : kFloatFormats) {
          EXPECT_FALSE(std::isfinite(max_abs_of(Stored(values, format).view())))
              << special << " at " << at << " of " << cols;
        }
      }
    }
  }
}

TEST_P(ElementwiseTest, TheSameBits) {
  Random random(6);
  const Stored a(random.dense(1030, 1024), Format::bf16);
  const Stored b(random.dense(300, 1024), Format::f32);
  const Stored s(absolute(random.dense(1, 300)), Format::f32);
  const auto expect_same = [&](auto run) {
    expect_same_bits([&](auto& cpu) {
      Stored out = Stored::poisoned(1024, 1024, Format::f32);
      run(cpu, out.mutable_view());
      return out.bytes();
    });
  };
  const auto part = [](const MutableMatrix& out) { return rows_of(out, 0, 300); };
  expect_same([&](const auto& cpu, const MutableMatrix& out) { cpu.copy(b.view(), part(out)); });
  expect_same([&](const auto& cpu, const MutableMatrix& out) { cpu.add(b.view(), b.view(), part(out)); });
  expect_same(
      [&](const auto& cpu, const MutableMatrix& out) { cpu.scale_rows(b.view(), s.view(), 2.0f, part(out), Op::n); });
  expect_same([&](const auto& cpu, const MutableMatrix& out) { cpu.scale_rows(b.view(), s.view(), 2.0f, out, Op::t); });
  expect_same_bits([&](auto& cpu) { return max_abs(cpu, a.view()); });
  const Stored c(random.dense(1030, 1100), Format::bf16);
  const Operand d(random, 1030, 1100, Form::nf4_nested);
  expect_same_bits([&](auto& cpu) {
    Stored out = Stored::poisoned(1030, 1100, Format::bf16);
    double squares = 0;
    cpu.subtract(c.view(), d.view(), out.mutable_view(), &squares);
    return std::pair(out.bytes(), squares);
  });
}

PISSA_EVERY_BACKEND(ElementwiseTest);

}  // namespace
}  // namespace pissa::test
