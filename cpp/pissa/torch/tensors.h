// Tensors in the form that the core takes: views, shapes, devices.
//
// Arguments were validated in python/pissa/ops with better messages. The ops check again only what would otherwise read
// or write out of bounds. Exceptions keep their text; which Python type they become depends on the torch version.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "pissa/core/error.h"
#include "pissa/core/types.h"

namespace pissa::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Format format_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Format::f32;
    case ScalarType::BFloat16:
      return Format::bf16;
    case ScalarType::Half:
      return Format::f16;
    default:
      PISSA_CHECK(false, "dtype: allowed are float32, bfloat16 and float16");
  }
  return Format::f32;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<std::int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// A tensor [..., cols] as a matrix [rows, cols].
inline Matrix matrix(const Tensor& tensor) {
  PISSA_CHECK(tensor.dim() >= 1, "a tensor with at least one dimension is needed");
  const std::int64_t cols = tensor.size(tensor.dim() - 1);
  const std::int64_t rows = cols == 0 ? 0 : tensor.numel() / cols;
  return {tensor.const_data_ptr(), rows, cols, cols, format_of(tensor.scalar_type())};
}

inline MutableMatrix mutable_matrix(const Tensor& tensor) {
  const Matrix view = matrix(tensor);
  return {tensor.mutable_data_ptr(), view.rows, view.cols, view.ld, view.format};
}

// Throws unless every tensor is on the device of the first one, because a device reads what it is given without
// checking.
inline void check_same_device(const Tensor& first, const Tensor& other) {
  PISSA_CHECK(first.is_cpu() == other.is_cpu() && first.get_device_index() == other.get_device_index(),
              "all tensors must be on one device");
}
inline void check_same_device(const Tensor& first, const OptionalTensor& other) {
  if (other) check_same_device(first, *other);
}
inline void check_same_device(const Tensor& first, const std::vector<Tensor>& others) {
  for (const Tensor& other : others) check_same_device(first, other);
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

inline void check_shape(const char* name, const Matrix& got, std::int64_t rows, std::int64_t cols) {
  PISSA_CHECK(got.rows == rows && got.cols == cols, name, ": got shape [", got.rows, ", ", got.cols, "]; needed: [",
              rows, ", ", cols, "]");
}

}  // namespace pissa::ops
