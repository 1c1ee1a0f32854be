// The ops that multiply: the linear layer with its adapter, and the adapter alone.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "pissa/torch/quantize.h"
#include "pissa/torch/tensors.h"

namespace pissa::ops {

// The adapter's factors as they cross the op boundary, in pairs: a and b, or none; a0 and b0 beside them, or none.
struct AdapterTensors {
  OptionalTensor a, b, a0, b0;
  float scaling;
  bool implicit;

  AdapterTensors(const OptionalTensor& a_, const OptionalTensor& b_, const OptionalTensor& a0_,
                 const OptionalTensor& b0_, double scaling_, bool implicit_)
      : a(contiguous(a_)),
        b(contiguous(b_)),
        a0(contiguous(a0_)),
        b0(contiguous(b0_)),
        scaling(static_cast<float>(scaling_)),
        implicit(implicit_) {
    PISSA_CHECK(a.has_value() == b.has_value() && a0.has_value() == b0.has_value() && (a || !a0),
                "factors: give a and b, and a0 and b0, in pairs");
  }

  Adapter view(std::int64_t out, std::int64_t in) const {
    if (!a) return {};
    Adapter adapter;
    const std::int64_t r = a->size(0);
    PISSA_CHECK(r >= 1, "a: got rank 0; needed: at least 1");
    const auto factor = [&](const char* name, const Tensor& tensor, std::int64_t rows, std::int64_t cols) {
      const Matrix view = matrix(tensor);
      check_shape(name, view, rows, cols);
      PISSA_CHECK(view.format == Format::f32, name, ": needed float32");
      return view;
    };
    adapter.a = factor("a", *a, r, in);
    adapter.b = factor("b", *b, out, r);
    if (a0) {
      adapter.a0 = factor("a0", *a0, r, in);
      adapter.b0 = factor("b0", *b0, out, r);
    }
    adapter.scaling = scaling;
    adapter.implicit = implicit;
    return adapter;
  }
};

// What a forward keeps for its backward: xa [tokens, r] float32, empty without an adapter, and the sums of factors one
// after the other in x's dtype, empty where it keeps none.
struct Kept {
  Tensor xa, sums;

  template <Backend B>
  static Kept by(const B&, const Tensor& x, const Matrix& x_view, const Adapter& adapter) {
    const std::int64_t size = FactorSums::kept<B>(x_view, adapter) ? FactorSums::size(adapter) : 0;
    return {new_tensor(x, {adapter ? x_view.rows : 0, adapter.rank()}, ScalarType::Float),
            new_tensor(x, {size}, x.scalar_type())};
  }
  Kept(const Tensor& xa_, const Tensor& sums_)
      : xa(torch::stable::contiguous(xa_)), sums(torch::stable::contiguous(sums_)) {}

  void check(const Matrix& x, const Adapter& adapter) const {
    if (adapter) check_shape("xa", matrix(xa), x.rows, adapter.rank());
    PISSA_CHECK(sums.numel() == 0 || (adapter && sums.numel() == FactorSums::size(adapter)), "sums: got ", sums.numel(),
                " elements; needed: what the forward returned");
  }
  FactorSums sums_view(const Adapter& adapter) const {
    return sums.numel() == 0 ? FactorSums{}
                             : FactorSums::at(sums.mutable_data_ptr(), format_of(sums.scalar_type()), adapter);
  }
};

// (y [..., out] in x's dtype, what is kept)
template <Backend B>
std::tuple<Tensor, Tensor, Tensor> linear_forward(B& backend, const Tensor& x, const Matrix& weight,
                                                  const OptionalTensor& bias, const AdapterTensors& factors) {
  const Tensor x_tensor = torch::stable::contiguous(x);
  const OptionalTensor bias_tensor = contiguous(bias);
  const Matrix bias_row = bias_tensor ? matrix(*bias_tensor) : Matrix{};
  if (bias_row) check_shape("bias", bias_row, 1, weight.rows);
  const Adapter adapter = factors.view(weight.rows, weight.cols);

  std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.rows;
  const Tensor y = new_tensor(x, sizes, x.scalar_type());
  const Kept kept = Kept::by(backend, x, matrix(x_tensor), adapter);
  pissa::linear_forward(backend, matrix(x_tensor), weight, bias_row, adapter, mutable_matrix(y),
                        mutable_matrix(kept.xa), kept.sums_view(adapter));
  return {y, kept.xa, kept.sums};
}

// The gradients' tensors: dx like x, empty unless needed; those of a and b, empty without an adapter.
struct LinearGradients {
  Tensor dx, grad_a, grad_b;
  bool need_dx;

  LinearGradients(const Tensor& x, const Adapter& adapter, bool need_dx_)
      : dx(new_tensor(
            x, need_dx_ ? std::vector<std::int64_t>(x.sizes().begin(), x.sizes().end()) : std::vector<std::int64_t>{0},
            x.scalar_type())),
        grad_a(new_tensor(x, {adapter.a.rows, adapter.a.cols}, ScalarType::Float)),
        grad_b(new_tensor(x, {adapter.b.rows, adapter.b.cols}, ScalarType::Float)),
        need_dx(need_dx_) {}

  MutableMatrix dx_view() const { return need_dx ? mutable_matrix(dx) : MutableMatrix{}; }
  std::tuple<Tensor, Tensor, Tensor> tensors() const { return {dx, grad_a, grad_b}; }
};

template <Backend B>
std::tuple<Tensor, Tensor, Tensor> linear_backward(B& backend, const Tensor& dy, const Tensor& x, const Matrix& weight,
                                                   const AdapterTensors& factors, const Kept& kept, bool need_dx) {
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Adapter adapter = factors.view(weight.rows, weight.cols);
  const Matrix x_view = matrix(x_tensor);
  check_shape("x", x_view, x_view.rows, weight.cols);
  check_shape("dy", matrix(dy_tensor), x_view.rows, weight.rows);
  kept.check(x_view, adapter);
  const LinearGradients gradients(x, adapter, need_dx);
  pissa::linear_backward(backend, matrix(dy_tensor), x_view, weight, adapter, matrix(kept.xa), gradients.dx_view(),
                         mutable_matrix(gradients.grad_a), mutable_matrix(gradients.grad_b), kept.sums_view(adapter));
  return gradients.tensors();
}

inline Matrix dense_weight(const Tensor& weight, const Tensor& x) {
  const Matrix view = matrix(weight);
  PISSA_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == view.cols,
              "x: last dimension must be weight's ", view.cols, " columns");
  return view;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& a0,
                                          const OptionalTensor& b0, double scaling, bool implicit) {
  Device device(x, weight, bias, a, b, a0, b0);
  const Tensor w = torch::stable::contiguous(weight);
  return linear_forward(device.backend(), x, dense_weight(w, x), bias, {a, b, a0, b0, scaling, implicit});
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& a, const OptionalTensor& b,
                                                   const OptionalTensor& a0, const OptionalTensor& b0, const Tensor& xa,
                                                   const Tensor& sums, double scaling, bool implicit, bool need_dx) {
  Device device(dy, x, weight, a, b, a0, b0, xa, sums);
  const Tensor w = torch::stable::contiguous(weight);
  return linear_backward(device.backend(), dy, x, dense_weight(w, x), {a, b, a0, b0, scaling, implicit}, {xa, sums},
                         need_dx);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                                    const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                                    const std::string& format, std::int64_t blocksize,
                                                    std::int64_t out_features, const OptionalTensor& bias,
                                                    const OptionalTensor& a, const OptionalTensor& b,
                                                    const OptionalTensor& a0, const OptionalTensor& b0, double scaling,
                                                    bool implicit) {
  Device device(x, codes, absmax, nested_absmax, offset, bias, a, b, a0, b0);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  return linear_forward(device.backend(), x, weight.view(out_features, x.size(x.dim() - 1)), bias,
                        {a, b, a0, b0, scaling, implicit});
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> quantized_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
    const OptionalTensor& offset, const std::string& format, std::int64_t blocksize, std::int64_t out_features,
    const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& a0, const OptionalTensor& b0,
    const Tensor& xa, const Tensor& sums, double scaling, bool implicit, bool need_dx) {
  Device device(dy, x, codes, absmax, nested_absmax, offset, a, b, a0, b0, xa, sums);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  return linear_backward(device.backend(), dy, x, weight.view(out_features, x.size(x.dim() - 1)),
                         {a, b, a0, b0, scaling, implicit}, {xa, sums}, need_dx);
}

// (y like base, what is kept)
template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_low_rank(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
                                                const OptionalTensor& a0, const OptionalTensor& b0, double scaling,
                                                bool implicit) {
  Device device(base, x, a, b, a0, b0);
  const AdapterTensors factors(a, b, a0, b0, scaling, implicit);
  const Tensor base_tensor = torch::stable::contiguous(base);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Matrix base_view = matrix(base_tensor);
  const Matrix x_view = matrix(x_tensor);
  const Adapter adapter = factors.view(base_view.cols, x_view.cols);
  check_shape("base", base_view, x_view.rows, base_view.cols);
  const Tensor y = new_tensor(base, {base.sizes().begin(), base.sizes().end()}, base.scalar_type());
  const Kept kept = Kept::by(device.backend(), x, x_view, adapter);
  pissa::add_low_rank_forward(device.backend(), base_view, x_view, adapter, mutable_matrix(y), mutable_matrix(kept.xa),
                              kept.sums_view(adapter));
  return {y, kept.xa, kept.sums};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_low_rank_backward(const Tensor& dy, const Tensor& x, const Tensor& a,
                                                         const Tensor& b, const OptionalTensor& a0,
                                                         const OptionalTensor& b0, const Tensor& xa, const Tensor& sums,
                                                         double scaling, bool implicit, bool need_dx) {
  Device device(dy, x, a, b, a0, b0, xa, sums);
  const Kept kept(xa, sums);
  const AdapterTensors factors(a, b, a0, b0, scaling, implicit);
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Matrix dy_view = matrix(dy_tensor);
  const Matrix x_view = matrix(x_tensor);
  const Adapter adapter = factors.view(dy_view.cols, x_view.cols);
  check_shape("dy", dy_view, x_view.rows, dy_view.cols);
  kept.check(x_view, adapter);
  const LinearGradients gradients(x, adapter, need_dx);
  pissa::add_low_rank_backward(device.backend(), dy_view, x_view, adapter, matrix(kept.xa), gradients.dx_view(),
                               mutable_matrix(gradients.grad_a), mutable_matrix(gradients.grad_b),
                               kept.sums_view(adapter));
  return gradients.tensors();
}

}  // namespace pissa::ops
