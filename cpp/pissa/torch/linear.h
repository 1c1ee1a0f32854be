// The ops that multiply: the linear layer with its adapter, and the adapter by itself.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/fused_linear.h"
#include "pissa/torch/quantize.h"
#include "pissa/torch/tensors.h"

namespace pissa::ops {

// The adapter's factors as they cross the op boundary, in pairs: a and b, or none; with them a0 and b0, or none.
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

// What a forward keeps for its backward: sums of factors in x's dtype, if the backend keeps them, and xa. Both are in
// one float32 tensor, empty without an adapter, because torch has a cost for each output of an op in every call, also
// on the CPU, which keeps only xa, in float32.
struct Kept {
  Tensor tensor;
  MutableMatrix xa;
  FactorSums sums;

  // Created by a forward at x.
  template <Backend B>
  Kept(const B&, const Tensor& x, const Matrix& x_view, const Adapter& adapter)
      : Kept(new_tensor(x, {floats<B>(x_view, adapter)}, ScalarType::Float), x_view, adapter,
             FactorSums::kept<B>(x_view, adapter), thin_format<B>(x_view)) {}

  // Read as the forward returned it.
  template <Backend B>
  Kept(const B&, const Matrix& x_view, const Adapter& adapter, const Tensor& kept)
      : Kept(torch::stable::contiguous(kept), x_view, adapter, FactorSums::kept<B>(x_view, adapter),
             thin_format<B>(x_view)) {
    PISSA_CHECK(kept.numel() == (floats<B>(x_view, adapter)) && kept.scalar_type() == ScalarType::Float, "kept: got ",
                kept.numel(), " elements; needed: what the forward returned, ", floats<B>(x_view, adapter));
  }

 private:
  Kept(const Tensor& tensor_, const Matrix& x, const Adapter& adapter, bool keeps_sums, Format thin) : tensor(tensor_) {
    float* data = static_cast<float*>(tensor.mutable_data_ptr());
    if (keeps_sums) sums = FactorSums::at(data, x.format, adapter);
    xa = {data + (keeps_sums ? floats_of_sums(adapter) : 0), x.rows, adapter.rank(), adapter.rank(), thin};
  }
  template <Backend B>
  static std::int64_t floats(const Matrix& x, const Adapter& adapter) {
    const std::int64_t size = element_size(thin_format<B>(x));
    const std::int64_t of_xa = adapter ? ceil_div(x.rows * adapter.rank() * size, 4) : 0;
    return of_xa + (FactorSums::kept<B>(x, adapter) ? floats_of_sums(adapter) : 0);
  }
  // Floats for the sums, which are halves; rounded up so that xa is aligned to 16 bytes.
  static std::int64_t floats_of_sums(const Adapter& adapter) { return ceil_div(FactorSums::size(adapter), 8) * 4; }
};

// (y [..., out] in x's dtype, the kept tensor)
template <Backend B>
std::tuple<Tensor, Tensor> linear_forward(B& backend, const Tensor& x, const Matrix& weight, const OptionalTensor& bias,
                                          const AdapterTensors& factors, bool int8 = false) {
  const Tensor x_tensor = torch::stable::contiguous(x);
  const OptionalTensor bias_tensor = contiguous(bias);
  const Matrix bias_row = bias_tensor ? matrix(*bias_tensor) : Matrix{};
  if (bias_row) check_shape("bias", bias_row, 1, weight.rows);
  const Adapter adapter = factors.view(weight.rows, weight.cols);

  std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.rows;
  const Tensor y = new_tensor(x, sizes, x.scalar_type());
  const Kept kept(backend, x, matrix(x_tensor), adapter);
  pissa::linear_forward(backend, matrix(x_tensor), weight, bias_row, adapter, mutable_matrix(y), kept.xa, kept.sums,
                        int8);
  return {y, kept.tensor};
}

// The tensors of the gradients: dx like x, empty unless needed; those of a and b, empty without an adapter.
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
                                                   const AdapterTensors& factors, const Tensor& kept_tensor,
                                                   bool need_dx, bool int8 = false) {
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Adapter adapter = factors.view(weight.rows, weight.cols);
  const Matrix x_view = matrix(x_tensor);
  check_shape("x", x_view, x_view.rows, weight.cols);
  check_shape("dy", matrix(dy_tensor), x_view.rows, weight.rows);
  const Kept kept(backend, x_view, adapter, kept_tensor);
  const LinearGradients gradients(x, adapter, need_dx);
  pissa::linear_backward(backend, matrix(dy_tensor), x_view, weight, adapter, kept.xa, gradients.dx_view(),
                         mutable_matrix(gradients.grad_a), mutable_matrix(gradients.grad_b), kept.sums, int8);
  return gradients.tensors();
}

inline Matrix dense_weight(const Tensor& weight, const Tensor& x) {
  const Matrix view = matrix(weight);
  PISSA_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(x.dim() - 1) == view.cols,
              "x: last dimension must be weight's ", view.cols, " columns");
  return view;
}

template <class Device>
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& a0,
                                  const OptionalTensor& b0, double scaling, bool implicit) {
  Device device(x, weight, bias, a, b, a0, b0);
  const Tensor w = torch::stable::contiguous(weight);
  return linear_forward(device.backend(), x, dense_weight(w, x), bias, {a, b, a0, b0, scaling, implicit});
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& a, const OptionalTensor& b,
                                                   const OptionalTensor& a0, const OptionalTensor& b0,
                                                   const Tensor& kept_tensor, double scaling, bool implicit,
                                                   bool need_dx) {
  Device device(dy, x, weight, a, b, a0, b0, kept_tensor);
  const Tensor w = torch::stable::contiguous(weight);
  return linear_backward(device.backend(), dy, x, dense_weight(w, x), {a, b, a0, b0, scaling, implicit}, kept_tensor,
                         need_dx);
}

template <class Device>
std::tuple<Tensor, Tensor> quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                            const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                            const std::string& format, std::int64_t blocksize,
                                            std::int64_t out_features, const OptionalTensor& bias,
                                            const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& a0,
                                            const OptionalTensor& b0, double scaling, bool implicit, bool int8) {
  Device device(x, codes, absmax, nested_absmax, offset, bias, a, b, a0, b0);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  return linear_forward(device.backend(), x, weight.view(out_features, x.size(x.dim() - 1)), bias,
                        {a, b, a0, b0, scaling, implicit}, int8);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> quantized_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& codes, const Tensor& absmax, const OptionalTensor& nested_absmax,
    const OptionalTensor& offset, const std::string& format, std::int64_t blocksize, std::int64_t out_features,
    const OptionalTensor& a, const OptionalTensor& b, const OptionalTensor& a0, const OptionalTensor& b0,
    const Tensor& kept_tensor, double scaling, bool implicit, bool need_dx, bool int8) {
  Device device(dy, x, codes, absmax, nested_absmax, offset, a, b, a0, b0, kept_tensor);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  return linear_backward(device.backend(), dy, x, weight.view(out_features, x.size(x.dim() - 1)),
                         {a, b, a0, b0, scaling, implicit}, kept_tensor, need_dx, int8);
}

// (y like base, the kept tensor)
template <class Device>
std::tuple<Tensor, Tensor> add_low_rank(const Tensor& base, const Tensor& x, const Tensor& a, const Tensor& b,
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
  const Kept kept(device.backend(), x, x_view, adapter);
  pissa::add_low_rank_forward(device.backend(), base_view, x_view, adapter, mutable_matrix(y), kept.xa, kept.sums);
  return {y, kept.tensor};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_low_rank_backward(const Tensor& dy, const Tensor& x, const Tensor& a,
                                                         const Tensor& b, const OptionalTensor& a0,
                                                         const OptionalTensor& b0, const Tensor& kept_tensor,
                                                         double scaling, bool implicit, bool need_dx) {
  Device device(dy, x, a, b, a0, b0, kept_tensor);
  const AdapterTensors factors(a, b, a0, b0, scaling, implicit);
  const Tensor dy_tensor = torch::stable::contiguous(dy);
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Matrix dy_view = matrix(dy_tensor);
  const Matrix x_view = matrix(x_tensor);
  const Adapter adapter = factors.view(dy_view.cols, x_view.cols);
  check_shape("dy", dy_view, x_view.rows, dy_view.cols);
  const Kept kept(device.backend(), x_view, adapter, kept_tensor);
  const LinearGradients gradients(x, adapter, need_dx);
  pissa::add_low_rank_backward(device.backend(), dy_view, x_view, adapter, kept.xa, gradients.dx_view(),
                               mutable_matrix(gradients.grad_a), mutable_matrix(gradients.grad_b), kept.sums);
  return gradients.tensors();
}

}  // namespace pissa::ops
