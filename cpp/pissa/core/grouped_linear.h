// The adapted linear layers of a group at once, as a mixture of experts has them: each has the rows of x that were sent
// to it, which lie together. All are of one shape, format, block size, kind of scales, rank and scaling, and compute
// the whole: y = x W^T + s (x A^T) B^T, the residual W lacking what the adapter starts from.
#pragma once

#include <concepts>
#include <cstdint>
#include <span>

#include "pissa/core/backend.h"
#include "pissa/core/fused_linear.h"
#include "pissa/core/types.h"

namespace pissa {

/// One layer of a group, and its rows of x: [first, first + rows), of which there may be none.
struct GroupedLayer {
  Matrix weight;    ///< [out, in]
  Adapter adapter;  ///< not implicit
  std::int64_t first = 0;
  std::int64_t rows = 0;

  /// Its rows of a matrix of all.
  template <class M>
  M part(const M& matrix) const {
    return matrix ? rows_of(matrix, first, rows) : matrix;
  }
};

/// A backend that can compute the forward of a group at once: it returns false, with nothing written, where it cannot.
template <class B>
concept MultipliesGroups =
    Backend<B> && requires(B backend, Matrix x, std::span<const GroupedLayer> layers, MutableMatrix out) {
      { backend.multiply_group(x, layers, out, out) } -> std::same_as<bool>;
    };

namespace detail {

/// Calls run(sums) with memory for the sums of a layer's factors, where a forward of it alone would keep them: a group
/// keeps none, so that each pass adds them up.
template <Backend B, class F>
void with_sums(B& backend, const Matrix& x, const Adapter& adapter, F run) {
  if (!FactorSums::kept<B>(x, adapter)) return run(FactorSums{});
  const auto memory = backend.alloc(1, FactorSums::size(adapter), x.format);
  run(FactorSums::at(memory.view().data, x.format, adapter));
}

}  // namespace detail

/// The outputs of all layers.
///
/// @param backend computes
/// @param x [rows, in], dense
/// @param layers whose rows are all of x
/// @param y [rows, out], dense, is written
/// @param xa [rows, r] f32, receives x A^T for the backward
/// @param in_int8 as in linear_forward
template <Backend B>
void grouped_linear_forward(B& backend, const Matrix& x, std::span<const GroupedLayer> layers, const MutableMatrix& y,
                            const MutableMatrix& xa, bool in_int8 = false) {
  if constexpr (MultipliesGroups<B>) {
    if (backend.multiply_group(x, layers, y, xa)) return;
  }
  for (const GroupedLayer& layer : layers) {
    if (layer.rows == 0) continue;
    detail::with_sums(backend, layer.part(x), layer.adapter, [&](const FactorSums& sums) {
      linear_forward(backend, layer.part(x), layer.weight, {}, layer.adapter, layer.part(y), layer.part(xa), sums,
                     in_int8);
    });
  }
}

/// Gradients of the layers at x, one after the other; zeros for a layer without rows.
///
/// @param backend computes
/// @param dy [rows, out], the gradient of y, in x's format
/// @param x [rows, in], as in the forward
/// @param layers as in the forward
/// @param xa what the forward wrote
/// @param dx [rows, in], dense, is written; absent: not computed
/// @param grads_a of each layer [r, in] f32, is written: the gradient of its adapter's a
/// @param grads_b of each layer [out, r] f32, is written: the gradient of its adapter's b
/// @param in_int8 as in the forward
template <Backend B>
void grouped_linear_backward(B& backend, const Matrix& dy, const Matrix& x, std::span<const GroupedLayer> layers,
                             const Matrix& xa, const MutableMatrix& dx, std::span<const MutableMatrix> grads_a,
                             std::span<const MutableMatrix> grads_b, bool in_int8 = false) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto& [weight, adapter, first, rows] = layers[i];
    const auto part = [&](const auto& matrix) { return layers[i].part(matrix); };
    detail::with_sums(backend, part(x), adapter, [&](const FactorSums& sums) {
      if constexpr (KeepsFactorSums<B>) {
        if (sums.a) backend.add_both({adapter.a0, adapter.a, sums.a}, {adapter.b0, adapter.b, sums.b});
      }
      linear_backward(backend, part(dy), part(x), weight, adapter, part(xa), rows == 0 ? MutableMatrix{} : part(dx),
                      grads_a[i], grads_b[i], sums, in_int8);
    });
  }
}

}  // namespace pissa
