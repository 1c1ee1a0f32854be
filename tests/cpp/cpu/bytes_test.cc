// Products with a weight in integers of 8 bits: Precision::int8.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "pissa/cpu/kernels.h"
#include "support/isa_test.h"
#include "support/matrices.h"
#include "support/reference.h"
#include "support/threads.h"

namespace pissa::test {
namespace {

class BytesTest : public IsaTest {
 protected:
  void multiply(const Matrix& a, const Matrix& weight, Op op, float scale, std::span<const Term> tail,
                const Matrix& bias, const MutableMatrix& out) const {
    if (op == Op::t) return backend().weight_gemm_nt(a, weight, scale, Precision::int8, tail, bias, out);
    backend().weight_gemm_nn(a, weight, scale, Precision::int8, tail, out);
  }
};

// The largest |element| of each row's parts of that size, in place of every element.
Dense largest_of_parts(const Dense& a, std::int64_t size) {
  Dense result(a.rows, a.cols);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t first = 0; first < a.cols; first += size) {
      double largest = 0;
      const std::int64_t end = std::min(a.cols, first + size);
      for (std::int64_t k = first; k < end; ++k) largest = std::max(largest, std::fabs(a(i, k)));
      for (std::int64_t k = first; k < end; ++k) result(i, k) = largest;
    }
  }
  return result;
}

// A byte is off by half a step, of which the largest element of its block has 127, or of a weight's block what the
// kernels allow. The step of a weight in four bits follows the largest element that its codes could stand for, not the
// largest that they do: `reach` times as much at most.
Dense bound_of(const cpu::Kernels& kernels, const Dense& x, const Dense& w, double reach) {
  const double w_step = reach / kernels.bytes;
  const Dense x_error = (0.5 / 127) * largest_of_parts(x, cpu::kByteRun);
  const Dense w_error = transposed(0.5 * w_step * largest_of_parts(transposed(w), cpu::ByteBlocks(w.rows).size));
  return (absolute(x) + x_error) * w_error + x_error * absolute(w);
}

struct Case {
  Form form;
  std::int64_t m, out, in;
};

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Form form : kForms) {
    all.push_back({form, 17, 70, 45});  // less than a block; rows of codes that share bytes or blocks
    all.push_back({form, 31, 512 + 32, 320});
    all.push_back({form, 20, 130, 1536});  // two panels
    all.push_back({form, 20, 1100, 96});
  }
  for (const Form form : gguf_forms()) all.push_back({form, 29, 300, 768}), all.push_back({form, 30, 1090, 256});
  return all;
}

TEST_P(BytesTest, EveryFormatIsWithinHalfAStep) {
  Random random(1);
  for (const auto& [form, m, out, in] : cases()) {
    for (const Op op : {Op::t, Op::n}) {
      SCOPED_TRACE(::testing::Message() << name(form) << (op == Op::t ? " nt " : " nn ") << m << ", " << out << ", "
                                        << in);
      const float scale = random.pick({1.0f, -0.3f});
      const Operand x(random, m, op == Op::t ? in : out, random.pick({Form::f32, Form::bf16, Form::f16}));
      const Operand weight(random, out, in, form);
      const std::int64_t n = op == Op::t ? out : in;
      const Operand xa(random, m, 3, Form::f32), b(random, n, 3, Form::f32), bias(random, 1, n, Form::f32);
      const Term tail[] = {{xa.view(), Op::n, b.view(), Op::t, 2.0f}};
      const bool with_tail = random.coin();
      Stored y = Stored::poisoned(m, n, Format::f32, random.below(4));
      multiply(x.view(), weight.view(), op, scale, {tail, with_tail ? 1u : 0u}, op == Op::t ? bias.view() : Matrix{},
               y.mutable_view());

      const Dense x_values = double{scale} * x.values(), w = oriented(weight.values(), op);
      Dense expected = x_values * w, magnitude = absolute(x_values) * absolute(w);
      Dense bound = bound_of(kernels(), x_values, w, is_quantized(static_cast<Format>(form)) ? 2 : 1);
      if (with_tail) {
        expected = expected + 2.0 * (xa.values() * transposed(b.values()));
        magnitude = magnitude + 2.0 * (absolute(xa.values()) * absolute(transposed(b.values())));
      }
      if (op == Op::t) expected = expected + bias.values(), magnitude = magnitude + absolute(bias.values());
      const Dense got = y.values();
      double worst = 0, square = 0, norm_square = 0;
      for (std::size_t i = 0; i < got.values.size(); ++i) {
        const double error = std::fabs(got.values[i] - expected.values[i]);
        worst = std::max(
            worst, error / (bound.values[i] + gamma(x_values.cols + 8) * (magnitude.values[i] + bound.values[i])));
        square += error * error, norm_square += expected.values[i] * expected.values[i];
        if (!std::isfinite(error)) worst = error;
      }
      EXPECT_LE(worst, 1);
      // Errors of both operands are as independent as the elements: rarely more than 2% of the result.
      EXPECT_LE(std::sqrt(square / norm_square), 0.05);
      EXPECT_TRUE(y.padding_intact());
    }
  }
}

// Integers, of which every 32 elements contain the largest, are their own bytes.
TEST_P(BytesTest, IntegersAreExact) {
  Random random(2);
  const auto integers = [&](std::int64_t rows, std::int64_t cols, int largest) {
    Dense values(rows, cols);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols; ++j) {
        values(i, j) = (i + j) % 32 == 0 ? largest : static_cast<double>(random.below(2 * largest + 1)) - largest;
      }
    }
    return values;
  };
  for (const std::int64_t inner : {64, 100, 256, 300, 700}) {
    for (const std::int64_t m : {17, 28, 530}) {
      const Dense x = integers(m, inner, 127), w = integers(inner, 75, kernels().bytes);
      const Stored x_stored(x, Format::bf16), as_given(w, Format::f32), turned(transposed(w), Format::bf16);
      for (const Op op : {Op::t, Op::n}) {
        Stored y = Stored::poisoned(m, 75, Format::f32);
        multiply(x_stored.view(), op == Op::t ? turned.view() : as_given.view(), op, 1.0f, {}, {}, y.mutable_view());
        EXPECT_EQ(y.values().values, (x * w).values) << inner << ", " << m << (op == Op::t ? " nt" : " nn");
      }
    }
  }
}

// Zeros stay zeros, numbers near f32's limits are no worse than others, and what is not finite reaches its rows alone.
TEST_P(BytesTest, ZerosExtremesAndWhatIsNotFinite) {
  Random random(3);
  const Dense w = random.dense(40, 300);
  for (const double scale : {1e-30, 1e30, 1e-42}) {
    Dense x = scale * random.dense(20, 300);
    for (std::int64_t k = 0; k < 300; ++k) x(1, k) = 0;
    const Stored x_stored(x, Format::f32), weight(w, Format::f32);
    Stored y = Stored::poisoned(20, 40, Format::f32);
    multiply(x_stored.view(), weight.view(), Op::t, 1.0f, {}, {}, y.mutable_view());
    const Dense expected = x * transposed(w), got = y.values();
    const Dense bound =
        scale < 1e-40 ? absolute(x) * absolute(transposed(w)) : bound_of(kernels(), x, transposed(w), 1);
    for (std::size_t i = 0; i < got.values.size(); ++i) {
      EXPECT_LE(std::fabs(got.values[i] - expected.values[i]), 1.0001 * bound.values[i] + 0x1p-140) << scale;
    }
  }
  for (const double value : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    Dense x = random.dense(20, 300);
    x(7, 299) = value;
    const Stored x_stored(x, Format::f32), weight(w, Format::f32);
    Stored y = Stored::poisoned(20, 40, Format::f32);
    multiply(x_stored.view(), weight.view(), Op::t, 1.0f, {}, {}, y.mutable_view());
    const Dense got = y.values();
    for (std::int64_t i = 0; i < 20; ++i) {
      for (std::int64_t j = 0; j < 40; ++j) EXPECT_EQ(std::isfinite(got(i, j)), i != 7) << i;
    }
  }
}

// Columns of x that are much larger than the others leave them their digits, one in 64 at most. Those of a gradient do
// not.
TEST_P(BytesTest, ColumnsMuchLargerThanTheOthersAreApart) {
  Random random(5);
  const std::int64_t m = 130, out = 90, in = 300;
  const std::int64_t columns[] = {299, 0, 64, 63, 130, 200};  // from the largest on: the last is one too many
  Dense x = random.dense(m, in);
  for (double size = 1e4; const std::int64_t column : columns) {
    for (std::int64_t i = 0; i < m; ++i) x(i, column) *= size;
    size /= 2;
  }
  for (const Form form : {Form::f32, Form::nf4, Form::mxfp4}) {
    SCOPED_TRACE(name(form));
    const Stored x_stored(x, Format::f32);
    const Operand weight(random, out, in, form);
    Stored y = Stored::poisoned(m, out, Format::f32);
    multiply(x_stored.view(), weight.view(), Op::t, -0.5f, {}, {}, y.mutable_view());
    const Dense scaled = -0.5 * x_stored.values(), w = transposed(weight.values());
    Dense others = scaled;
    for (const std::int64_t column : std::span(columns).first(5)) {
      for (std::int64_t i = 0; i < m; ++i) others(i, column) = 0;
    }
    const Dense expected = scaled * w, magnitude = absolute(scaled) * absolute(w), got = y.values();
    const Dense bound = bound_of(kernels(), others, w, form == Form::f32 ? 1 : 2);
    for (std::size_t i = 0; i < got.values.size(); ++i) {
      ASSERT_LE(std::fabs(got.values[i] - expected.values[i]), bound.values[i] + gamma(in + 8) * magnitude.values[i]);
    }
  }
}

TEST_P(BytesTest, TheSameBits) {
  Random random(4);
  const std::int64_t m = 45, out = 1034, in = 576, r = 6;
  Dense x_values = random.dense(m, in);
  for (std::int64_t i = 0; i < m; ++i) x_values(i, 100) *= 50;  // apart
  const Stored x(x_values, Format::bf16);
  const Operand dy(random, m, out, Form::bf16);
  const Operand weight(random, out, in, Form::nf4_nested), xa(random, m, r, Form::f32), b(random, out, r, Form::f32);
  const Term tail[] = {{xa.view(), Op::n, b.view(), Op::t, 2.0f, Precision::bf16}};
  expect_same_on_any_threads(kernels(), [&](auto& cpu) {
    Stored y = Stored::poisoned(m, out, Format::bf16);
    cpu.weight_gemm_nt(x.view(), weight.view(), 1.0f, Precision::int8, tail, {}, y.mutable_view());
    return y.bytes();
  });
  expect_same_on_any_threads(kernels(), [&](auto& cpu) {
    Stored dx = Stored::poisoned(m, in, Format::f32);
    cpu.weight_gemm_nn(dy.view(), weight.view(), 1.0f, Precision::int8, {}, dx.mutable_view());
    return dx.bytes();
  });
}

std::vector<std::string> isas_with_bytes() {
  std::vector<std::string> isas = tested_isas();
  std::erase_if(isas, [](const std::string& isa) { return !tested_kernels(isa).bytes; });
  return isas;
}

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(BytesTest);
INSTANTIATE_TEST_SUITE_P(Isa, BytesTest, ::testing::ValuesIn(isas_with_bytes()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace pissa::test
