// A linear layer with a low-rank adapter, forward and backward, over a weight in any format; and the adapter by itself,
// added to the result of any other function.
//
//   A = A0 + dA, B = B0 + dB   r rows / columns; A0, B0 frozen, dA, dB trained
//   the whole       y = x W^T + s (x A^T) B^T + bias                         W is a residual, which lacks s B0 A0
//   the change      y = x W^T + s ((x A^T) dB^T + (x dA^T) B0^T) + bias      W is the whole weight ("implicit")
//   backward        ddB = s dy^T (x A^T)    ddA = s (dy B)^T x    dx = dy W + the same tail transposed
//
// The change is exactly 0 at dA = dB = 0. Both forms have the gradients of PiSSA (arXiv 2404.02948, section 3). The
// whole without A0 and B0, with A = dA and B = dB, is LoRA. x, y, dy, dx: [tokens, ...] in f32, bf16 or f16. Factors
// and their gradients: f32.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "pissa/core/backend.h"
#include "pissa/core/error.h"
#include "pissa/core/types.h"

namespace pissa {

/// The adapter of one layer: the trained a and b, and the start a0 and b0, both given or both absent. With a0 and b0, a
/// and b are the differences from them; otherwise they are the factors themselves. All f32.
struct Adapter {
  Matrix a;   ///< [r, in]
  Matrix b;   ///< [out, r]
  Matrix a0;  ///< [r, in]
  Matrix b0;  ///< [out, r]
  float scaling = 1.0f;
  bool implicit = false;  ///< with a0 and b0: whether the weight is whole, so that only the change is added

  /// Whether there is an adapter.
  explicit operator bool() const { return static_cast<bool>(a); }
  std::int64_t rank() const { return a.rows; }
  /// Whether only the change is added, which is 0 at a = b = 0.
  bool adds_change() const { return a0 && implicit; }
};

/// For up to this many rows of x, two products with A0 and dA cost less than one with their sum, which is written and
/// read again.
inline constexpr std::int64_t kFewTokens = 16;

/// The precision of the product with the weight, for a first operand `x`: int8 if `in_int8` and the device multiplies
/// so.
template <Backend B>
Precision precision_of_base(const B& backend, const Matrix& x, bool in_int8) {
  if constexpr (MultipliesBytes<B>) {
    if (in_int8 && backend.multiplies_bytes(x.rows)) return Precision::int8;
  }
  return precision_of(x.format);
}

/// Whether the device's products round the factors to x's half precision, once for all of them.
template <Backend B>
bool rounds_factors(const Matrix& x) {
  return KeepsFactorSums<B> && x.rows > kFewTokens && x.format != Format::f32;
}

/// The format of x A^T and dy B: bf16 if they would be rounded to it, otherwise f32, in place of f16 too, which might
/// not hold x A^T (precision_of_xa).
template <Backend B>
Format thin_format(const Matrix& x) {
  return rounds_factors<B>(x) && x.format == Format::bf16 ? Format::bf16 : Format::f32;
}

/// A0 + dA and B0 + dB rounded to x's half precision, which the forward may keep for the backward.
struct FactorSums {
  MutableMatrix a;  ///< [r, in]
  MutableMatrix b;  ///< [out, r]; absent if only the change is added, which uses B0 and dB separately

  /// Whether a forward at x keeps them: not if the device does not round factors, or uses them separately anyway.
  template <Backend B>
  static bool kept(const Matrix& x, const Adapter& adapter) {
    return rounds_factors<B>(x) && adapter.a0;
  }
  /// The number of their elements, which are stored one after the other.
  static std::int64_t size(const Adapter& adapter) {
    return adapter.rank() * (adapter.a.cols + (adapter.adds_change() ? 0 : adapter.b.rows));
  }
  /// Sums in memory for `size` elements of that format.
  static FactorSums at(void* data, Format format, const Adapter& adapter) {
    const auto [r, in] = std::pair{adapter.rank(), adapter.a.cols};
    FactorSums sums{{data, r, in, in, format}, {}};
    if (!adapter.adds_change()) {
      sums.b = {static_cast<char*>(data) + r * in * element_size(format), adapter.b.rows, r, r, format};
    }
    return sums;
  }
};

namespace detail {

/// A sum of one or two terms.
class TermPair {
 public:
  void add(const Term& term) { terms_[count_++] = term; }
  operator std::span<const Term>() const { return std::span(terms_).first(count_); }

 private:
  std::array<Term, 2> terms_;
  std::size_t count_ = 0;
};

/// start + delta of one factor, or delta if there is no start; already summed, in its own memory, or left separate.
template <Backend B>
class Factor {
 public:
  Factor(B& backend, const Matrix& start, const Matrix& delta, const Matrix& sum, bool apart)
      : start_(apart && !sum ? start : Matrix{}),
        delta_(sum ? sum : delta),
        sum_(backend.alloc(start && !sum && !apart ? delta.rows : 0, delta.cols, Format::f32)) {
    if (!start || sum || apart) return;
    backend.add(start, delta, sum_.view());
    delta_ = sum_.view();
  }
  /// scale * a * op(start + delta)
  TermPair times(const Matrix& a, Op op, float scale, Precision precision) const {
    TermPair terms;
    if (start_) terms.add({a, Op::n, start_, op, scale, precision});
    terms.add({a, Op::n, delta_, op, scale, precision});
    return terms;
  }

 private:
  Matrix start_;
  Matrix delta_;
  decltype(std::declval<B&>().alloc(0, 0, Format::f32)) sum_;
};

template <Backend B>
void product(B& backend, const Matrix& a, Op op_a, const Matrix& b, Op op_b, float scale, Precision precision,
             const MutableMatrix& out) {
  const std::array terms{Term{a, op_a, b, op_b, scale, precision}};
  backend.gemm(terms, {}, out);
}

/// Calls write(tail) with the thin products that the adapter adds to y. xa [tokens, r] receives x A^T, and `sums`
/// receives the factors if it has memory for them.
template <Backend B, class F>
void with_forward_tail(B& backend, const Matrix& x, const Adapter& adapter, const MutableMatrix& xa,
                       const FactorSums& sums, F write) {
  const float s = adapter.scaling;
  const Precision precision = precision_of(x.format), of_xa = precision_of_xa(x.format);
  const bool apart = x.rows <= kFewTokens;
  if constexpr (KeepsFactorSums<B>) {
    if (sums.a) backend.add_both({adapter.a0, adapter.a, sums.a}, {adapter.b0, adapter.b, sums.b});
  }
  const Factor factor_a(backend, adapter.a0, adapter.a, sums.a, apart);
  backend.gemm(factor_a.times(x, Op::t, 1.0f, precision), {}, xa);
  if (adapter.adds_change()) {
    auto x_delta_a = backend.alloc(x.rows, adapter.rank(), xa.format);
    product(backend, x, Op::n, adapter.a, Op::t, 1.0f, precision, x_delta_a.view());
    TermPair tail;
    tail.add({xa, Op::n, adapter.b, Op::t, s, of_xa});
    tail.add({x_delta_a.view(), Op::n, adapter.b0, Op::t, s, of_xa});
    return write(tail);
  }
  const Factor factor_b(backend, adapter.b0, adapter.b, sums.b, apart);
  write(factor_b.times(xa, Op::t, s, of_xa));
}

/// Computes the adapter's gradients, and calls write(tail) with the thin products that it adds to dx.
template <Backend B, class F>
void with_backward_tail(B& backend, const Matrix& dy, const Matrix& x, const Adapter& adapter, const Matrix& xa,
                        const FactorSums& sums, const MutableMatrix& grad_a, const MutableMatrix& grad_b, F write) {
  const std::int64_t r = adapter.rank();
  const float s = adapter.scaling;
  const bool change = adapter.adds_change();
  const bool apart = x.rows <= kFewTokens;
  const Precision precision = precision_of(x.format);
  product(backend, dy, Op::t, xa, Op::n, s, precision_of_xa(x.format), grad_b);

  // dy B, or dy dB and dy B0 separately, which are then summed
  auto dy_b = backend.alloc(dy.rows, r, change ? Format::f32 : thin_format<B>(x));
  auto dy_b0 = backend.alloc(change ? dy.rows : 0, r, Format::f32);
  const Factor factor_b(backend, change ? Matrix{} : adapter.b0, adapter.b, sums.b, apart);
  backend.gemm(factor_b.times(dy, Op::n, 1.0f, precision), {}, dy_b.view());
  if (change) product(backend, dy, Op::n, adapter.b0, Op::n, 1.0f, precision, dy_b0.view());

  const Factor factor_a(backend, adapter.a0, adapter.a, sums.a, apart && !change);
  TermPair tail = factor_a.times(dy_b.view(), Op::n, s, precision);
  if (change) tail.add({dy_b0.view(), Op::n, adapter.a, Op::n, s, precision});
  write(tail);

  if (change) backend.add(dy_b.view(), dy_b0.view(), dy_b.view());
  product(backend, dy_b.view(), Op::t, x, Op::n, s, precision, grad_a);
}

// linear_backward, for every row of dy.
template <Backend B>
void backward_of_rows(B& backend, const Matrix& dy, const Matrix& x, const Matrix& weight, const Adapter& adapter,
                      const Matrix& xa, const MutableMatrix& dx, const MutableMatrix& grad_a,
                      const MutableMatrix& grad_b, const FactorSums& sums, bool in_int8) {
  const Precision precision = precision_of_base(backend, dy, in_int8);
  if (!adapter) {
    if (dx) backend.weight_gemm_nn(dy, weight, 1.0f, precision, {}, dx);
    return;
  }
  const auto ahead = backend.decode_ahead(dx ? weight : Matrix{}, Op::n, precision, dy.rows);
  with_backward_tail(backend, dy, x, adapter, xa, sums, grad_a, grad_b, [&](std::span<const Term> tail) {
    if (dx) backend.weight_gemm_nn(dy, ahead, 1.0f, precision, tail, dx);
  });
}

// The rows of a matrix, in their own memory.
template <FindsZeroRows B>
auto taken(B& backend, const Matrix& from, std::span<const std::int64_t> rows) {
  auto some = backend.alloc(static_cast<std::int64_t>(rows.size()), from.cols, from.format);
  backend.take_rows(from, rows, some.view());
  return some;
}

}  // namespace detail

/// Computes the layer's output, x W^T + bias and what the adapter adds, in one read of the weight.
///
/// @param backend computes
/// @param x [tokens, in], dense
/// @param weight [out, in], any format
/// @param bias [1, out], dense; may be absent
/// @param adapter may be absent: Adapter{}
/// @param y [tokens, out], dense, is written
/// @param xa [tokens, r] in thin_format or f32, receives x A^T for the backward; absent without an adapter
/// @param sums receives the factors for the backward; given if FactorSums::kept returns true
/// @param in_int8 whether the product with the weight may be in Precision::int8
template <Backend B>
void linear_forward(B& backend, const Matrix& x, const Matrix& weight, const Matrix& bias, const Adapter& adapter,
                    const MutableMatrix& y, const MutableMatrix& xa, const FactorSums& sums = {},
                    bool in_int8 = false) {
  const Precision precision = precision_of_base(backend, x, in_int8);
  if (!adapter) return backend.weight_gemm_nt(x, weight, 1.0f, precision, {}, bias, y);
  const auto ahead = backend.decode_ahead(weight, Op::t, precision, x.rows);
  detail::with_forward_tail(backend, x, adapter, xa, sums, [&](std::span<const Term> tail) {
    backend.weight_gemm_nt(x, ahead, 1.0f, precision, tail, bias, y);
  });
}

/// Computes the gradients of the layer at x.
///
/// Rows of dy that are 0 are not multiplied, if the backend finds them and they are an eighth or more: those of
/// padding, of tokens after the last label, and in the last block of all tokens without a label.
///
/// @param backend computes
/// @param dy [tokens, out], the gradient of y, in x's format
/// @param x [tokens, in], as in the forward
/// @param weight [out, in], as in the forward
/// @param adapter as in the forward
/// @param xa as written by the forward
/// @param dx [tokens, in], dense, is written; absent: not computed
/// @param grad_a [r, in] f32, is written: the gradient of adapter.a
/// @param grad_b [out, r] f32, is written: the gradient of adapter.b
/// @param sums as written by the forward
/// @param in_int8 as in the forward
template <Backend B>
void linear_backward(B& backend, const Matrix& dy, const Matrix& x, const Matrix& weight, const Adapter& adapter,
                     const Matrix& xa, const MutableMatrix& dx, const MutableMatrix& grad_a,
                     const MutableMatrix& grad_b, const FactorSums& sums = {}, bool in_int8 = false) {
  if constexpr (FindsZeroRows<B>) {
    const std::vector<std::int64_t> rows = backend.nonzero_rows(dy);
    const auto count = static_cast<std::int64_t>(rows.size());
    if (dy.rows > kFewTokens && 8 * count <= 7 * dy.rows) {
      const auto of_adapter = std::span(rows).first(adapter ? rows.size() : 0);
      const auto dy_rows = detail::taken(backend, dy, rows);
      const auto x_rows = detail::taken(backend, x, of_adapter);
      const auto xa_rows = detail::taken(backend, xa, of_adapter);
      auto dx_rows = backend.alloc(dx ? count : 0, dx.cols, dx.format);
      detail::backward_of_rows(backend, dy_rows.view(), x_rows.view(), weight, adapter, xa_rows.view(),
                               dx ? dx_rows.view() : MutableMatrix{}, grad_a, grad_b, sums, in_int8);
      if (dx) backend.put_rows(dx_rows.view(), rows, dx);
      return;
    }
  }
  detail::backward_of_rows(backend, dy, x, weight, adapter, xa, dx, grad_a, grad_b, sums, in_int8);
}

/// The adapter's part by itself, the whole or the change, added to the result of any function of x.
///
/// @param backend computes
/// @param base [tokens, out], dense
/// @param x [tokens, in], dense
/// @param adapter as in linear_forward
/// @param y [tokens, out] in base's format, is written; may be base
/// @param xa as in linear_forward
/// @param sums as in linear_forward
template <Backend B>
void add_low_rank_forward(B& backend, const Matrix& base, const Matrix& x, const Adapter& adapter,
                          const MutableMatrix& y, const MutableMatrix& xa, const FactorSums& sums = {}) {
  detail::with_forward_tail(backend, x, adapter, xa, sums,
                            [&](std::span<const Term> tail) { backend.gemm(tail, base, y); });
}

/// Gradients of the same, as in linear_backward. The gradient of base is dy.
template <Backend B>
void add_low_rank_backward(B& backend, const Matrix& dy, const Matrix& x, const Adapter& adapter, const Matrix& xa,
                           const MutableMatrix& dx, const MutableMatrix& grad_a, const MutableMatrix& grad_b,
                           const FactorSums& sums = {}) {
  detail::with_backward_tail(backend, dy, x, adapter, xa, sums, grad_a, grad_b, [&](std::span<const Term> tail) {
    if (dx) backend.gemm(tail, {}, dx);
  });
}

}  // namespace pissa
