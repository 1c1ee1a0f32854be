// The ops of an output layer: scores of tokens, without logits in memory.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "pissa/core/token_scores.h"
#include "pissa/torch/linear.h"

namespace pissa::ops {

// (scores [..., kScores] f32, dx like x, which is empty unless needed)
template <Backend B>
std::tuple<Tensor, Tensor> token_scores(B& backend, const Tensor& x, const Matrix& weight, const OptionalTensor& bias,
                                        const Tensor& labels, double scale, double cap, bool need_dx) {
  const Tensor x_tensor = torch::stable::contiguous(x);
  const Tensor label_tensor = torch::stable::contiguous(labels);
  const OptionalTensor bias_tensor = contiguous(bias);
  const Matrix bias_row = bias_tensor ? matrix(*bias_tensor) : Matrix{};
  if (bias_row) check_shape("bias", bias_row, 1, weight.rows);
  const Matrix x_view = matrix(x_tensor);
  check_shape("x", x_view, x_view.rows, weight.cols);
  PISSA_CHECK(labels.scalar_type() == ScalarType::Long && labels.numel() == x_view.rows, "labels: needed ", x_view.rows,
              " of int64");
  const std::vector<std::int64_t> sizes(x.sizes().begin(), x.sizes().end());
  std::vector<std::int64_t> score_sizes = sizes;
  score_sizes.back() = kScores;
  const Tensor scores = new_tensor(x, score_sizes, ScalarType::Float);
  const Tensor dx = new_tensor(x, need_dx ? sizes : std::vector<std::int64_t>{0}, x.scalar_type());
  pissa::token_scores(backend, x_view, weight, bias_row,
                      static_cast<const std::int64_t*>(label_tensor.const_data_ptr()), static_cast<float>(scale),
                      static_cast<float>(cap), mutable_matrix(scores), need_dx ? mutable_matrix(dx) : MutableMatrix{});
  return {scores, dx};
}

template <class Device>
std::tuple<Tensor, Tensor> token_scores(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                        const Tensor& labels, double scale, double cap, bool need_dx) {
  Device device(x, weight, bias, labels);
  const Tensor w = torch::stable::contiguous(weight);
  return token_scores(device.backend(), x, dense_weight(w, x), bias, labels, scale, cap, need_dx);
}

template <class Device>
std::tuple<Tensor, Tensor> quantized_token_scores(const Tensor& x, const Tensor& codes, const Tensor& absmax,
                                                  const OptionalTensor& nested_absmax, const OptionalTensor& offset,
                                                  const std::string& format, std::int64_t blocksize,
                                                  std::int64_t out_features, const OptionalTensor& bias,
                                                  const Tensor& labels, double scale, double cap, bool need_dx) {
  Device device(x, codes, absmax, nested_absmax, offset, bias, labels);
  const QuantizedTensors weight(codes, absmax, nested_absmax, offset, format, blocksize);
  return token_scores(device.backend(), x, weight.view(out_features, x.size(x.dim() - 1)), bias, labels, scale, cap,
                      need_dx);
}

}  // namespace pissa::ops
