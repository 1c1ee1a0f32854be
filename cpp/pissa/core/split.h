// PiSSA's split of a weight (arXiv 2404.02948, eq. 2-4), with LoRA's scaling s and torch's orientation W [out, in]:
//
//   W ~ U diag(S) V^T (rank r)     B0 = U sqrt(S / s) [out, r]     A0 = sqrt(S / s) V^T [r, in]
//   residual = W - s B0 A0         kept as it is in W's dtype (explicit), quantised (QPiSSA, eq. 8), or not at all
//   (implicit)
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "pissa/core/backend.h"
#include "pissa/core/error.h"
#include "pissa/core/quantized.h"
#include "pissa/core/rsvd.h"

namespace pissa {

inline void check_split(const Matrix& w, std::int64_t r, float scaling, const SvdOptions& options) {
  PISSA_CHECK(std::isfinite(scaling) && scaling > 0, "scaling: got ", scaling, "; allowed: a positive number");
  check_svd(w, r, options);
}

/// Computes the start factors of a weight: a0 = sqrt(S / scaling) V^T and b0 = U sqrt(S / scaling), of rank r =
/// a0.rows.
///
/// @param backend computes
/// @param w [out, in], any format
/// @param scaling LoRA's, s = alpha / r; positive
/// @param options of the decomposition
/// @param a0 [r, in] f32, is written
/// @param b0 [out, r] f32, is written
/// @param largest max_abs of w, if it is already known
/// @param s [1, r] f32, receives the singular values; may be absent
/// @param moment [in, in] f32, the activations' second moment, as svd_lowrank takes it; may be absent
/// @throws std::invalid_argument a scaling that is not positive; otherwise as svd_lowrank
template <Backend B>
void split(B& backend, const Matrix& w, float scaling, const SvdOptions& options, const MutableMatrix& a0,
           const MutableMatrix& b0, std::optional<float> largest = std::nullopt, const MutableMatrix& s = {},
           const Matrix& moment = {}) {
  check_split(w, a0.rows, scaling, options);
  const auto svd = svd_lowrank(backend, w, a0.rows, options, largest, moment);
  backend.scale_rows(svd.v.view(), svd.s.view(), scaling, a0, Op::n);
  backend.scale_rows(svd.u.view(), svd.s.view(), scaling, b0, Op::t);
  if (s) backend.copy(svd.s.view(), s);
}

/// A weight [out, in], and the destinations of its start factors: a0 [r, in] and b0 [out, r], f32.
struct SplitTask {
  Matrix w;
  float scaling;
  MutableMatrix a0;
  MutableMatrix b0;
  std::optional<float> largest = std::nullopt;  ///< max_abs of w, if it is already known
  MutableMatrix s = {};                         ///< [1, r] f32: the destination of the singular values, if wanted
  Matrix moment = {};                           ///< [in, in] f32: the activations' second moment, if it is to be used
};

/// Checks everything that `split` refuses in a task, except elements that are not finite.
inline void check_task(const SplitTask& task, const SvdOptions& options) {
  check_split(task.w, task.a0.rows, task.scaling, options);
  check_second_moment(task.moment, task.w);
}

/// Returns f(). If f throws a std::invalid_argument, its message gets the prefix "weights[index]: ".
template <class F>
auto naming_weight(std::size_t index, F f) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(message("weights[", index, "]: ", error.what()));
  }
}

/// The term that turns w into its residual: gemm stores w + term in any dtype, gemm_quantized quantises it on the way.
inline Term minus_factors(const Matrix& a0, const Matrix& b0, float scaling) {
  return {b0, Op::n, a0, Op::n, -scaling};
}

/// QPiSSA (arXiv 2404.02948, sec. 4): the start factors of w as `split` computes them, and the residual w - scaling *
/// b0 * a0, quantised without being stored. Further alternations of the two are made by pissa.ops, in Python.
///
/// @param backend computes
/// @param w [out, in], dense
/// @param scaling LoRA's, s = alpha / r; positive
/// @param options of the decomposition
/// @param a0 [r, in] f32, is written
/// @param b0 [out, r] f32, is written
/// @param q the destination of codes and scales, and their format
/// @param largest max_abs of w, if it is already known
/// @throws std::invalid_argument a w that is quantised, or a block size that q's format lacks; otherwise as `split`
template <Backend B>
void split_quantized(B& backend, const Matrix& w, float scaling, const SvdOptions& options, const MutableMatrix& a0,
                     const MutableMatrix& b0, const QuantOutput& q, std::optional<float> largest = std::nullopt) {
  PISSA_CHECK(!is_quantized(w.format), "weight: got ", info(w.format).name,
              "; needed: f32, bf16 or f16, so dequantise it first");
  check_blocksize(q.format, q.blocksize, w.cols);
  split(backend, w, scaling, options, a0, b0, largest);
  const std::array terms{minus_factors(a0, b0, scaling)};
  backend.gemm_quantized(terms, w, q);
}

}  // namespace pissa
