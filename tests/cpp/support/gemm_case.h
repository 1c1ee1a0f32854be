// A random GEMM: operands in any form, an output full of NaN, and the float64 result with its error bound.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "pissa/core/types.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {

/// Terms scale * op(a) * op(b) of an [m, n] sum, and what they add up to.
class TermList {
 public:
  /// Terms of the given precision; `rounds`: whether the backend rounds operands to it.
  TermList(std::int64_t m, std::int64_t n, Precision precision = Precision::f32, bool rounds = false)
      : expected_{Dense(m, n), Dense(m, n)}, precision_(precision), rounds_(rounds) {}

  /// Where operands are rounded, a power of two: what carries the scale differs, and it is the same before and after.
  float random_scale(Random& random) const {
    return rounds_ ? random.pick({1.0f, -1.0f, 0.25f, -2.0f}) : random.pick({1.0f, -1.0f, 0.3f, -2.75f});
  }

  void add(Random& random, std::int64_t k, Form form_a, Op op_a, Form form_b, Op op_b, float scale) {
    const auto [m, n] = std::pair{expected_.value.rows, expected_.value.cols};
    operands_.emplace_back(random, op_a == Op::n ? m : k, op_a == Op::n ? k : m, form_a);
    operands_.emplace_back(random, op_b == Op::n ? k : n, op_b == Op::n ? n : k, form_b);
    const Operand& a = *(operands_.end() - 2);
    const Operand& b = operands_.back();
    terms_.push_back({a.view(), op_a, b.view(), op_b, scale, precision_});
    Dense a_values = double{scale} * oriented(a.values(), op_a);
    Dense b_values = oriented(b.values(), op_b);
    if (rounds_) {
      const FloatFormat rounding = precision_ == Precision::bf16 ? kBf16 : kF16;
      a_values = rounded_to(rounding, a_values);
      b_values = rounded_to(rounding, b_values);
    }
    add_expected({a_values * b_values, absolute(a_values) * absolute(b_values)});
    roundings_ += k + 1;  // the additions, and the scaling
    int8_ |= form_b == Form::int8;
  }
  void add_expected(const Bounded& more) {
    expected_ = {expected_.value + more.value, expected_.magnitude + more.magnitude};
    roundings_ += 1;
  }

  const std::vector<Term>& terms() const { return terms_; }
  const Bounded& expected() const { return expected_; }
  /// For up to four rows bf16 rounds an NF4 weight's level, not level * absmax as the reference does, and neither
  /// operand beside an INT8 weight or blocks of GGUF; for up to 16 rows not an INT8 weight's elements.
  std::int64_t bf16_roundings() const {
    const std::int64_t rows = expected_.value.rows;
    return !rounds_ ? 0 : rows <= 4 ? 2 : rows <= 16 && int8_ ? 1 : 0;
  }
  std::int64_t roundings() const { return roundings_ + 1; }  // and the multiplication, where it is not fused

 private:
  std::deque<Operand> operands_;  // does not move them
  std::vector<Term> terms_;
  Bounded expected_;
  Precision precision_;
  bool rounds_;
  std::int64_t roundings_ = 0;
  bool int8_ = false;
};

inline Op random_op(Random& random) { return random.coin() ? Op::t : Op::n; }

/// Sizes at the edges of register tiles (rows 4, 6, 14; columns 8, 16, 32) and of blocks, others small.
struct Size {
  std::int64_t m, n, k;
};
inline const std::vector<Size>& edge_sizes() {
  static const std::vector<Size> sizes = [] {
    std::vector<Size> result;
    for (const std::int64_t m : {0, 1, 3, 4, 5, 6, 7, 13, 14, 15, 16, 17, 27, 28, 29, 511, 512, 513, 1030})
      result.push_back({m, 19, 21});
    for (const std::int64_t n : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 49, 63, 64, 65, 511, 512, 513, 1030})
      result.push_back({11, n, 21});
    for (const std::int64_t k : {0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1025})
      result.push_back({15, 33, k});
    result.push_back({1, 1, 1});
    result.push_back({513, 513, 5});
    result.push_back({43, 515, 514});
    return result;
  }();
  return sizes;
}

}  // namespace pissa::test
