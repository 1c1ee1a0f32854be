// Largest elements, for the host: a decomposition scales by them, and they show whether a weight is finite.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "pissa/core/backend.h"
#include "pissa/core/types.h"

namespace pissa {

/// Largest |element| of each matrix; not finite if any of its elements is not. Waits for the backend once for all.
template <Backend B>
std::vector<float> max_abs(B& backend, std::span<const Matrix> matrices) {
  const auto count = static_cast<std::int64_t>(matrices.size());
  if (count == 0) return {};
  const auto buffer = backend.alloc(1, count, Format::f32);
  float* largest = static_cast<float*>(buffer.view().data);
  backend.max_abs(matrices, largest);
  return backend.read(largest, count);
}

/// The same for one matrix.
template <Backend B>
float max_abs(B& backend, const Matrix& matrix) {
  return max_abs(backend, std::span(&matrix, 1))[0];
}

}  // namespace pissa
