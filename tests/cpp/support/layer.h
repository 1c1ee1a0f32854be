// A linear layer with an adapter, in memory and in float64, and the paper's formulas for it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "support/matrices.h"
#include "support/reference.h"

namespace pissa::test {

enum class Kind { none, lora, stored, implicit };
inline constexpr std::initializer_list<Kind> kKinds = {Kind::none, Kind::lora, Kind::stored, Kind::implicit};

/// A layer, an input and an output gradient.
struct Layer {
  std::int64_t tokens, in, out, r;
  Kind kind;
  float s;
  Operand x, dy, weight, bias, delta_a, delta_b, a0, b0;
  bool with_bias;

  Layer(Random& random, std::int64_t tokens_, std::int64_t in_, std::int64_t out_, std::int64_t r_, Kind kind_,
        Format format, Form weight_form)
      : tokens(tokens_),
        in(in_),
        out(out_),
        r(r_),
        kind(kind_),
        s(random.pick({1.0f, 0.5f, 2.0f, 5.65685f})),
        x(random, tokens, in, static_cast<Form>(format)),
        dy(random, tokens, out, static_cast<Form>(format)),
        weight(random, out, in, weight_form),
        bias(random, 1, out, static_cast<Form>(format)),
        delta_a(random, r, in, Form::f32),
        delta_b(random, out, r, Form::f32),
        a0(random, r, in, Form::f32),
        b0(random, out, r, Form::f32),
        with_bias(random.coin()) {}

  Adapter adapter() const {
    if (kind == Kind::none) return {};
    Adapter result{delta_a.view(), delta_b.view(), {}, {}, s, kind == Kind::implicit};
    if (kind != Kind::lora) {
      result.a0 = a0.view();
      result.b0 = b0.view();
    }
    return result;
  }
};

/// Memory for the sums of factors that a forward of the backend keeps for its backward, poisoned; or none.
template <class B>
struct KeptSums {
  std::vector<std::uint8_t> bytes;
  FactorSums view;

  KeptSums(const Matrix& x, const Adapter& adapter) {
    if (!FactorSums::kept<std::remove_cvref_t<B>>(x, adapter)) return;
    bytes.assign(static_cast<std::size_t>(FactorSums::size(adapter) * element_size(x.format)), 0xff);
    view = FactorSums::at(bytes.data(), x.format, adapter);
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

/// Roundings along the longest chain of a result: its inner dimensions, and a few for sums, scaling and bias.
inline constexpr std::int64_t kFew = 10;

/// Roundings to bf16, or better, along it: in a tail, of both factors and of what is between them; on CUDA also of
/// f16's, of an NF4 weight and of what the large product is added to. Activations in half precision are exact.
inline std::int64_t bf16_roundings(Format x) {
#if defined(PISSA_TEST_CUDA)
  return x == Format::f32 ? 0 : 6;
#else
  return x == Format::bf16 ? 3 : 0;
#endif
}

}  // namespace pissa::test
