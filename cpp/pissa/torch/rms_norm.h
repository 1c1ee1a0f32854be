// RMSNorm, only on the CPU.
#pragma once

#include <tuple>
#include <vector>

#include "pissa/torch/tensors.h"

namespace pissa::ops {

inline void check_norm(const Tensor& x, const Tensor& weight) {
  PISSA_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(x.dim() - 1) == weight.size(0) && weight.size(0) > 0,
              "weight: needed one number for each of x's last dimension");
}

// (y like x, scales [...] f32 of its rows)
template <class Device>
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double offset, double eps) {
  Device device(x, weight);
  check_norm(x, weight);
  const Tensor x_tensor = torch::stable::contiguous(x), w = torch::stable::contiguous(weight);
  const std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const Tensor y = new_tensor(x, sizes, x.scalar_type());
  const Tensor scales = new_tensor(x, {sizes.begin(), sizes.end() - 1}, ScalarType::Float);
  device.rms_norm_forward(matrix(x_tensor), matrix(w), static_cast<float>(offset), static_cast<float>(eps),
                          mutable_matrix(y), static_cast<float*>(scales.mutable_data_ptr()));
  return {y, scales};
}

template <class Device>
Tensor rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& scales, double offset) {
  Device device(dy, x, weight, scales);
  check_norm(x, weight);
  const Tensor dy_tensor = torch::stable::contiguous(dy), x_tensor = torch::stable::contiguous(x);
  const Tensor w = torch::stable::contiguous(weight);
  const Matrix x_view = matrix(x_tensor);
  check_shape("dy", matrix(dy_tensor), x_view.rows, x_view.cols);
  PISSA_CHECK(scales.numel() == x_view.rows && scales.scalar_type() == ScalarType::Float && scales.is_contiguous(),
              "scales: needed what the forward returned");
  const Tensor dx = new_tensor(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  device.rms_norm_backward(matrix(dy_tensor), x_view, matrix(w), static_cast<float>(offset),
                           static_cast<const float*>(scales.const_data_ptr()), mutable_matrix(dx));
  return dx;
}

}  // namespace pissa::ops
