// A change rounded into codes: every element by the core's rule, on every instruction set; and that rule.
#include "pissa/core/merge_codes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/isa_test.h"
#include "support/matrices.h"

namespace pissa::test {
namespace {

/// Calls f with every quantised format as a type.
template <std::size_t i = 0, class F>
void for_each_quantised(F f) {
  if constexpr (i < std::size(kFormats)) {
    if constexpr (is_quantized(kFormats[i])) f(GgufFormat<kFormats[i]>{});
    for_each_quantised<i + 1>(f);
  }
}

// From the levels alone, in f64: up from the last level that is not above the sum, or, if the change is negative, down
// from the first that is not below.
TEST(MergeCodes, RulesForOneCode) {
  Random random(1);
  for_each_quantised([&](auto kind) {
    constexpr Format kFormat = decltype(kind)::kFormat;
    SCOPED_TRACE(name(kFormat));
    std::vector<double> levels;
    for (int code = 0; code < 1 << info(kFormat).bits; ++code) {
      if (is_target<kFormat>(code)) levels.push_back(level_of_code<kFormat>(code));
    }
    std::sort(levels.begin(), levels.end());
    levels.erase(std::unique(levels.begin(), levels.end()), levels.end());
    const double span = levels.back() - levels.front();
    for (int trial = 0; trial < 4000; ++trial) {
      const auto code = static_cast<std::uint8_t>(random.below(1 << info(kFormat).bits));
      const double level = level_of_code<kFormat>(code);
      const auto by = static_cast<float>(random.normal() * span * random.pick({0.5, 0.05, 0.001}));
      const auto threshold = static_cast<float>(random.uniform());
      const ChangedCode changed = changed_code<kFormat>(code, by, threshold);
      if (!is_target<kFormat>(code)) {
        EXPECT_TRUE(!std::isnan(level) || changed.code == code);
        continue;
      }
      const double sum = level + by;
      const auto above = std::upper_bound(levels.begin(), levels.end(), sum);
      double expected = above == levels.begin() ? levels.front() : levels.back();
      if (above != levels.begin() && above != levels.end()) {
        const double share = (sum - above[-1]) / (*above - above[-1]);
        if (std::fabs(share - threshold) < 1e-3) continue;  // of the distance of levels, rounded by sums in f32
        expected = threshold < share ? *above : above[-1];
      }
      ASSERT_EQ(level_of_code<kFormat>(changed.code), static_cast<float>(expected))
          << level << " + " << by << ", " << threshold;
      EXPECT_FLOAT_EQ(changed.by, static_cast<float>(expected - level));
      EXPECT_EQ(changed.beyond, sum < levels.front() || sum > levels.back());
    }
    for (const float by : {0.0f, -0.0f, std::numeric_limits<float>::quiet_NaN()}) {
      for (int code = 0; code < 1 << info(kFormat).bits; ++code) {
        EXPECT_EQ(changed_code<kFormat>(static_cast<std::uint8_t>(code), by, 0x1p-25f).code, code);
      }
    }
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(level_of_code<kFormat>(changed_code<kFormat>(1, kInfinity, 0.5f).code), levels.back());
    EXPECT_TRUE(changed_code<kFormat>(1, -kInfinity, 0.5f).beyond);
  });
}

// 2^20 thresholds: their mean and their histogram in 64 cells within six standard errors; neighbours and seeds are not
// alike.
TEST(MergeCodes, ThresholdsAreUniform) {
  constexpr int kCount = 1 << 20, kCells = 64;
  const std::uint32_t key = threshold_key(7, 0), other = threshold_key(8, 0), far = threshold_key(7, 1ull << 32);
  std::array<int, kCells> cells{};
  double sum = 0, products = 0, seeds = 0, halves = 0;
  for (std::uint32_t i = 0; i < kCount; ++i) {
    const double u = threshold_at(key, i);
    ASSERT_GT(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++cells[static_cast<int>(u * kCells)];
    sum += u - 0.5;
    products += (u - 0.5) * (threshold_at(key, i + 1) - 0.5);
    seeds += (u - 0.5) * (threshold_at(other, i) - 0.5);
    halves += (u - 0.5) * (threshold_at(far, i) - 0.5);
  }
  const double root = std::sqrt(kCount);
  EXPECT_LT(std::fabs(sum), 6 * root / std::sqrt(12));
  for (const double products_of : {products, seeds, halves}) EXPECT_LT(std::fabs(products_of), 6 * root / 12);
  for (const int cell : cells) EXPECT_NEAR(cell, kCount / kCells, 6 * std::sqrt(kCount / kCells));
}

class MergeCodesTest : public IsaTest {};

// What a level of element i of the flattened matrix is worth.
float unit_of(const Matrix& matrix, std::int64_t i) {
  if (!is_read_only(matrix.format)) {
    const float scale = scale_of(matrix, i);
    return matrix.format == Format::int8 ? scale * kInt8Step : scale;
  }
  const FormatInfo row = info(matrix.format);
  const auto* block = static_cast<const std::uint8_t*>(matrix.data) + i / row.blocks.usual * row.block_bytes;
  return with_gguf(matrix.format, [&](auto kind) {
    using Layout = Gguf<decltype(kind)::kFormat>;
    if (matrix.format == Format::mxfp4_gguf) return half_e8m0(block[0]);
    const int group = static_cast<int>(i % row.blocks.usual / Layout::kGroup);
    return half_at(block, Layout::kScale) * static_cast<float>(Layout::scale_code(block, group));
  });
}

template <Format format>
std::uint8_t read_code(const std::uint8_t* codes, std::int64_t i) {
  if constexpr (is_read_only(format)) {
    constexpr FormatInfo row = info(format);
    return static_cast<std::uint8_t>(
        gguf_bits<format>(codes + i / row.blocks.usual * row.block_bytes, static_cast<int>(i % row.blocks.usual)));
  } else {
    return code_at<format>(codes, i);
  }
}

// Rank 1, so that the change is the same in every order of products. Everything but the codes stays.
TEST_P(MergeCodesTest, EveryElementByTheRule) {
  Random random(2);
  std::vector<Form> forms = gguf_forms();
  for (const Form form : kForms) {
    if (is_quantized(static_cast<Format>(form)) || form == Form::nf4_nested) forms.push_back(form);
  }
  struct Shape {
    std::int64_t rows, cols;
  };
  for (const Form form : forms) {
    for (auto [rows, cols] : {Shape{1, 256}, Shape{113, 768}, Shape{5, 35}, Shape{3, 1100}}) {
      const bool in_row = is_read_only(static_cast<Format>(form)) || info(static_cast<Format>(form)).blocks.in_row;
      if (in_row) cols = ceil_div(cols, 256) * 256;
      SCOPED_TRACE(::testing::Message() << name(form) << " [" << rows << ", " << cols << "]");
      const Operand operand(random, rows, cols, form);
      const Matrix weight = operand.view();
      const std::int64_t bytes = code_bytes(weight.format, rows * cols);
      const Stored b(random.dense(rows, 1), Format::f32), a(random.dense(1, cols), Format::f32);
      const float scale = 0.5f;
      const std::array change{Term{b.view(), Op::n, a.view(), Op::n, scale}};
      for (const Rounding rounding : {Rounding::dither, Rounding::nearest}) {
        std::vector<std::uint8_t> codes(bytes + 1, 0xee);
        const MergeSums sums = backend().merge_codes(weight, change, {}, rounding, 5, codes.data());
        EXPECT_EQ(codes.back(), 0xee);
        const auto* old = static_cast<const std::uint8_t*>(weight.data);
        std::vector<std::uint8_t> expected(old, old + bytes);
        MergeSums all;
        const Stored product = Stored::poisoned(rows, cols, Format::f32);
        backend().gemm(change, {}, const_cast<Stored&>(product).mutable_view());
        const Dense changes = product.values();
        for (std::int64_t i = 0; i < rows * cols; ++i) {
          const auto by = static_cast<float>(changes.values[i]);
          const float unit = unit_of(weight, i), levels = std::isfinite(1.0f / unit) ? 1.0f / unit : 0.0f;
          const float threshold =
              rounding == Rounding::nearest ? 0.5f : threshold_at(threshold_key(5, 0), static_cast<std::uint32_t>(i));
          for_each_quantised([&](auto kind) {
            constexpr Format kFormat = decltype(kind)::kFormat;
            if (kFormat != weight.format) return;
            const ChangedCode changed = changed_code<kFormat>(read_code<kFormat>(old, i), by * levels, threshold);
            all.beyond += changed.beyond;
            if (changed.by == 0.0f) return;
            const double moved = double{changed.by} / levels;
            all.along += moved * by, all.square += moved * moved, all.moved += 1;
            if constexpr (is_read_only(kFormat)) {
              constexpr FormatInfo row = info(kFormat);
              put_gguf_bits<kFormat>(&expected[i / row.blocks.usual * row.block_bytes],
                                     static_cast<int>(i % row.blocks.usual), changed.code);
            } else {
              put_code<kFormat>(expected.data(), i, changed.code);
            }
          });
        }
        expected.push_back(0xee);
        ASSERT_EQ(codes, expected);
        EXPECT_EQ(sums.moved, all.moved);
        EXPECT_EQ(sums.beyond, all.beyond);
        EXPECT_NEAR(sums.along, all.along, 1e-10 * all.square + 1e-10 * std::fabs(all.along));
        EXPECT_NEAR(sums.square, all.square, 1e-10 * all.square);
        EXPECT_TRUE(all.moved > 0 || rows < 100);
      }
    }
  }
}

// Of a second moment with some memory; what is above the diagonal is not read.
Dense lower_factor(Random& random, std::int64_t cols) {
  Dense lower = random.dense(cols, cols);
  for (std::int64_t i = 0; i < cols; ++i) {
    for (std::int64_t j = 0; j < i; ++j) lower(i, j) *= 0.1;
    lower(i, i) = 0.5 + random.uniform();
    for (std::int64_t j = i + 1; j < cols; ++j) lower(i, j) = std::numeric_limits<double>::quiet_NaN();
  }
  return lower;
}

// From the last column to the first, each code follows by the rule from what the codes behind it lack. What they lack
// is computed in f64 from the result, so that no code depends on how another was rounded.
TEST_P(MergeCodesTest, ErrorFeedbackByTheRule) {
  Random random(4);
  std::vector<Form> forms = gguf_forms();
  for (const Form form : kForms) {
    if (is_quantized(static_cast<Format>(form)) || form == Form::nf4_nested) forms.push_back(form);
  }
  for (const Form form : forms) {
    const bool in_row = is_read_only(static_cast<Format>(form)) || info(static_cast<Format>(form)).blocks.in_row;
    const std::int64_t rows = 3, cols = in_row ? 768 : 603;
    SCOPED_TRACE(name(form));
    const Operand operand(random, rows, cols, form);
    const Matrix weight = operand.view();
    const auto* old = static_cast<const std::uint8_t*>(weight.data);
    const Dense lower = lower_factor(random, cols);
    const Stored factor(lower, Format::f32);
    const Stored b(random.dense(rows, 1), Format::f32), a(random.dense(1, cols), Format::f32);
    const Dense left = b.values(), right = a.values();
    const std::array change{Term{b.view(), Op::n, a.view(), Op::n, 0.1f}};
    for (const Rounding rounding : {Rounding::dither, Rounding::nearest}) {
      std::vector<std::uint8_t> codes(code_bytes(weight.format, rows * cols));
      const MergeSums sums = backend().merge_codes(weight, change, factor.view(), rounding, 5, codes.data());
      MergeSums all;
      for_each_quantised([&](auto kind) {
        constexpr Format kFormat = decltype(kind)::kFormat;
        if (kFormat != weight.format) return;
        for (std::int64_t i = 0; i < rows; ++i) {
          std::vector<double> errors(cols);
          for (std::int64_t j = cols - 1; j >= 0; --j) {
            const std::int64_t at = i * cols + j;
            const float unit = unit_of(weight, at);
            const double levels = std::isfinite(1.0f / unit) ? 1.0 / double{unit} : 0.0;
            const double wanted = 0.1 * left(i, 0) * right(0, j);
            double sum = 0, size = 0;
            for (std::int64_t k = j + 1; k < cols; ++k) {
              sum += errors[k] * lower(k, j);
              size += std::fabs(errors[k] * lower(k, j));
            }
            const float threshold = rounding == Rounding::nearest
                                        ? 0.5f
                                        : threshold_at(threshold_key(5, 0), static_cast<std::uint32_t>(at));
            const std::uint8_t before = read_code<kFormat>(old, at), after = read_code<kFormat>(codes.data(), at);
            const double moved =
                levels == 0 ? 0.0 : (level_of_code<kFormat>(after) - level_of_code<kFormat>(before)) / levels;
            // Sums of `cols` terms in f32, and a threshold near which either level is right.
            const double off = 1e-5 * (std::fabs(wanted) + size / lower(j, j)) + 1e-5 / std::max(levels, 1e-30);
            bool found = level_of_code<kFormat>(after) != level_of_code<kFormat>(after) && after == before;
            for (const double by : {-off, 0.0, off}) {
              const auto to = static_cast<float>((wanted + sum / lower(j, j) + by) * levels);
              const ChangedCode changed = changed_code<kFormat>(before, to, threshold);
              found = found || level_of_code<kFormat>(changed.code) == level_of_code<kFormat>(after);
            }
            ASSERT_TRUE(found) << i << ", " << j << ": " << int{before} << " -> " << int{after};
            errors[j] = wanted - (std::isnan(moved) ? 0.0 : moved);
            all.moved += after != before;
            all.along += (wanted - errors[j]) * wanted;
          }
        }
      });
      EXPECT_EQ(sums.moved, all.moved);
      EXPECT_NEAR(sums.along, all.along, 1e-4 * std::fabs(all.along) + 1e-4);
      EXPECT_GT(all.moved, 0);
    }
  }
}

// Tasks of 112 rows, on several threads; several terms.
TEST_P(MergeCodesTest, ThreadsDoNotMatter) {
  Random random(3);
  const Operand weight(random, 300, 1536, Form::nf4);
  const Stored b(random.dense(300, 9), Format::f32), a(random.dense(9, 1536), Format::f32);
  const std::array change{Term{b.view(), Op::n, a.view(), Op::n, 0.03f},
                          Term{b.view(), Op::n, a.view(), Op::n, -0.01f}};
  const Stored factor(lower_factor(random, 1536), Format::f32);
  for (const Matrix& lower : {Matrix{}, factor.view()}) {
    std::vector<std::vector<std::uint8_t>> results;
    std::vector<MergeSums> sums;
    for (const std::int64_t threads : {1, 3}) {
      const cpu::ThreadExecutor executor(threads);
      std::vector<std::uint8_t> codes(code_bytes(Format::nf4, 300 * 1536));
      sums.push_back(cpu::CpuBackend(executor, kernels())
                         .merge_codes(weight.view(), change, lower, Rounding::dither, 1, codes.data()));
      results.push_back(codes);
    }
    EXPECT_EQ(results[0], results[1]);
    EXPECT_EQ(sums[0].along, sums[1].along);
  }
}

PISSA_EVERY_ISA(MergeCodesTest);

}  // namespace
}  // namespace pissa::test
