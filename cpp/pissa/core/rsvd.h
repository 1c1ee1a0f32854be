// Randomised truncated SVD: W [m, n] ~ U diag(S) V^T of rank r.
//
// Block Krylov: an orthonormal basis of span{W Omega, (W W^T) W Omega, ..., (W W^T)^q W Omega}, with all blocks kept,
// and the best rank-r approximation of W inside it (Musco, Musco: Randomized block Krylov methods, arXiv 1504.05477,
// Alg. 2). A basis vector, multiplied by W^T for the next block, is already a row of the projected matrix, so each pass
// over W is as thin as a block. Subspace iteration keeps only the last block (Halko, Martinsson, Tropp, arXiv
// 0909.4061, Alg. 4.4), which needs less memory but more passes for the same quality.
//
// For activations x with the second moment R = E[x^T x], [n, n], an approximation C loses tr((W - C) R (W - C)^T) of
// the outputs x W^T. The best C of rank r is U U^T W with the leading eigenvectors U of W R W^T (QERA, arXiv
// 2410.06040, eq. 14, without its matrix roots, which cancel). This uses the same basis, of combinations of W's rows,
// multiplied by R between W and W^T. R may be singular.
//
// A pass reads W once. At equal quality on a hard spectrum, block Krylov needs 6 / 10 passes at r = 16, and 10 / 16
// narrower ones at r = 128. torch.svd_lowrank with niter = 4 / 16 needs 10 / 34.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <utility>

#include "pissa/core/backend.h"
#include "pissa/core/error.h"
#include "pissa/core/max_abs.h"
#include "pissa/core/types.h"

namespace pissa {

/// Block Krylov keeps the vectors of every pass. Subspace iteration keeps only the last: less memory for a large rank.
enum class SvdMethod : std::int32_t { krylov, subspace };

/// A step of the algorithm reads W twice, once in each direction.
inline constexpr std::int64_t kPassesPerStep = 2;

/// How a weight is decomposed.
struct SvdOptions {
  SvdMethod method = SvdMethod::krylov;
  std::optional<std::int64_t> passes = std::nullopt;  ///< over W, an even number; none: passes_for
  std::uint64_t seed = 0;                             ///< of the random sketch, which is the same on every device
};

/// Columns of the sketch beyond r: an eighth of r, so that the work grows with r, or 8 for small ranks.
constexpr std::int64_t oversampling(std::int64_t r) { return std::max<std::int64_t>(8, r / 8); }

/// Passes over W for rank r: the requested number, or otherwise enough to lose no more energy on power-law spectra
/// sigma_i = i^-p than torch.svd_lowrank with niter = 16, which needs 34. p = 0.2 is the hardest, with about the same
/// loss at any rank (bench/results/svd_quality.json has the numbers). Subspace iteration is torch's method, except for
/// oversampling.
constexpr std::int64_t passes_for(std::int64_t r, const SvdOptions& options) {
  if (options.passes) return *options.passes;
  if (options.method == SvdMethod::subspace) return 28;
  return r <= 64 ? 10 : r <= 96 ? 12 : 14;
}

/// Columns of a block: enough for r vectors and the oversampling after `steps` blocks. For the same number of basis
/// vectors, more and narrower blocks find better ones, but a pass over W has a fixed cost, however narrow it is. On a
/// hard spectrum (4096 x 4096, r = 128), 6 blocks of 72 lose 1.8% of the energy; 3 of 144, for the same work, lose
/// 3.8%. Multiples of 14 fill the CPU's register tiles. From five blocks on, seven eighths of r and the oversampling
/// are enough for small ranks: 5 blocks of 63, r = 64, take 1.2 times as long as 4 of 70 and lose a fifth; 5 of 70
/// take 1.3 times.
constexpr std::int64_t block_size(std::int64_t r, std::int64_t steps) {
  constexpr std::int64_t kTile = 14;
  constexpr std::int64_t kNarrow = 5 * kTile;
  const std::int64_t wanted = r + oversampling(r);
  const std::int64_t least = (wanted + steps - 1) / steps;
  const std::int64_t widest = steps < 5 ? wanted : wanted - wanted / 8;
  return std::min(widest, std::max({kNarrow, least, wanted / 2 / kTile * kTile}));
}

/// Factors of a truncated SVD of a weight [out, in], one singular vector per row, f32, in the backend's memory. Each
/// has a `view()`, its MutableMatrix.
template <class Buffer>
struct SvdFactors {
  Buffer u;  ///< [r, out]
  Buffer s;  ///< [1, r], descending, not negative
  Buffer v;  ///< [r, in]
};

/// Checks that a second moment fits a weight.
inline void check_second_moment(const Matrix& moment, const Matrix& w) {
  PISSA_CHECK(!moment || (moment.rows == w.cols && moment.cols == w.cols && moment.format == Format::f32),
              "second_moment: got [", moment.rows, ", ", moment.cols, "]; needed: [in, in] = [", w.cols, ", ", w.cols,
              "] in f32");
}

inline void check_svd(const Matrix& w, std::int64_t r, const SvdOptions& options) {
  const std::int64_t max_rank = std::min(w.rows, w.cols);
  PISSA_CHECK(r >= 1 && r <= max_rank, "r: got ", r, "; allowed: 1 to min(out, in) = ", max_rank,
              " for a weight of shape [", w.rows, ", ", w.cols, "]");
  const std::int64_t passes = passes_for(r, options);
  PISSA_CHECK(passes >= kPassesPerStep && passes % kPassesPerStep == 0, "passes: got ", passes,
              "; allowed: an even number of at least 2");
}

namespace detail {

/// The largest elements of a weight and, if there is one, of the second moment.
struct Largest {
  float weight;
  float moment;
};

template <Backend B>
auto svd_lowrank(B& backend, const Matrix& w, std::int64_t r, const SvdOptions& options, const Matrix& moment,
                 const Largest& largest, Rank rank) {
  // The basis is on the shorter side of W, or on the side of its rows if the columns are weighted. The `wide` vectors
  // are on the other side.
  const bool on_rows = moment || w.rows <= w.cols;
  const std::int64_t max_rank = std::min(w.rows, w.cols);
  const std::int64_t basis_dim = on_rows ? w.rows : w.cols;
  const std::int64_t wide_dim = on_rows ? w.cols : w.rows;

  const std::int64_t steps = passes_for(r, options) / kPassesPerStep;
  const bool keep_blocks = options.method == SvdMethod::krylov;
  const std::int64_t block = std::min(block_size(r, keep_blocks ? steps : 1), max_rank);
  const std::int64_t max_basis = keep_blocks ? std::min(block * steps, max_rank) : block;

  // Thin operands are multiplied by 2^-exponent, so that products of huge or tiny weights stay inside f32's range.
  const auto exponent_of = [](float value) { return value > 0 ? std::max(std::ilogb(value), -120) : 0; };
  const int exponent = exponent_of(largest.weight);
  // A half-precision weight is exact in products of its format. Units for that format may flush denormals to zero, so
  // they are not used for a weight at the ends of the range.
  const bool in_f16 = w.format == Format::f16 && backend.multiplies_in(Format::f16) && exponent >= -14;
  const bool in_bf16 = w.format == Format::bf16 && backend.multiplies_in(Format::bf16) && std::abs(exponent) < 64;
  const bool in_half = in_f16 || in_bf16;
  const Precision precision = in_f16 ? Precision::f16 : in_bf16 ? Precision::bf16 : Precision::f32;
  // An f16 weight is far inside f32's range, but the thin operands may be outside that of f16. There each row gets its
  // own exponent, which does not change what they span.
  const float unit = in_f16 ? 1.0f : std::ldexp(1.0f, -exponent);
  const auto normal_buffer = backend.alloc(in_f16 ? block : 0, wide_dim, Format::f16);
  const auto wide_to_basis = [&](Matrix wide, const MutableMatrix& basis) {
    if (in_f16) {
      const MutableMatrix normal = rows_of(normal_buffer.view(), 0, wide.rows);
      backend.normalize_rows(wide, normal);
      wide = normal;
    }
    if (on_rows) backend.weight_gemm_nt(wide, w, unit, precision, {}, {}, basis);
    else backend.weight_gemm_nn(wide, w, unit, precision, {}, basis);
  };
  const auto basis_to_wide = [&](const Matrix& basis, const MutableMatrix& wide) {
    if (on_rows) backend.weight_gemm_nn(basis, w, unit, precision, {}, wide);
    else backend.weight_gemm_nt(basis, w, unit, precision, {}, {}, wide);
  };

  auto basis_buffer = backend.alloc(max_basis, basis_dim, Format::f32);  // rows q: orthonormal
  auto wide_buffer = backend.alloc(max_basis, wide_dim, Format::f32);    // rows q W (or W q): the projection of W
  auto weighed_buffer = backend.alloc(moment ? max_basis : 0, wide_dim, Format::f32);  // rows q W R
  auto sketch = backend.alloc(block, wide_dim, Format::f32);
  auto rounded_buffer = backend.alloc(in_half ? block : 0, basis_dim, in_half ? w.format : Format::bf16);
  const MutableMatrix basis = basis_buffer.view();
  const MutableMatrix wide = wide_buffer.view();
  const MutableMatrix weighed = moment ? weighed_buffer.view() : wide;
  Matrix thin = sketch.view();

  const float moment_unit = std::ldexp(1.0f, -exponent_of(largest.moment));
  const auto weigh = [&](const Matrix& rows, const MutableMatrix& out) {
    const Term product[] = {{rows, Op::n, moment, Op::n, moment_unit}};
    backend.gemm(product, {}, out);
  };
  // Activations with outliers weight some columns a million times as much as others, so that the contribution of the
  // rest to a row would be lost. Therefore rows are made orthogonal to each other on the way to the basis.
  const auto separate = [&](const MutableMatrix& rows) {
    const MutableMatrix separated = rows_of(sketch.view(), 0, rows.rows);
    backend.copy(rows, separated);
    backend.orthonormalize(separated, 0, rows.rows, rank);
    return separated;
  };

  backend.fill_signs(sketch.view(), options.seed, 1.0f);
  if (moment) {
    weigh(sketch.view(), rows_of(weighed, 0, block));
    thin = separate(rows_of(weighed, 0, block));
  }
  std::int64_t first = 0;  // where the current block starts
  std::int64_t rows = block;
  for (std::int64_t step = 0;; ++step) {
    wide_to_basis(rows_of(thin, 0, rows), rows_of(basis, first, rows));
    backend.orthonormalize(basis, first, rows, rank);
    if (in_half) {
      // On the way to the basis `thin` may be rounded, because any vectors near the leading ones are enough. On the way
      // back the rows of `wide` must be those of the basis times W. Therefore the basis itself is rounded, and both are
      // changed alike when it is made orthonormal again.
      const MutableMatrix rounded = rows_of(rounded_buffer.view(), 0, rows);
      backend.copy(rows_of(basis, first, rows), rounded);
      backend.copy(rounded, rows_of(basis, first, rows));
      basis_to_wide(rounded, rows_of(wide, first, rows));
      backend.reorthonormalize(basis, wide, first, rows);
    } else {
      basis_to_wide(rows_of(basis, first, rows), rows_of(wide, first, rows));
    }
    if (moment) weigh(rows_of(wide, first, rows), rows_of(weighed, first, rows));
    const std::int64_t kept = first + rows;
    if (step + 1 == steps || kept == max_rank) break;  // out of passes, or the basis is the whole space: exact
    // The next products start from `wide` as it is. Its rows have very different lengths, but this has no cost, because
    // each has its own exponent and the Cholesky factor takes them in order.
    thin = moment ? separate(rows_of(weighed, first, rows)) : rows_of(wide, first, rows);
    if (keep_blocks) {
      first = kept;
      rows = std::min(block, max_basis - kept);
    }
  }

  // W ~ Q^T (Q W): the SVD of the projection, from its small Gram matrix.
  const std::int64_t basis_rows = first + rows;
  const MutableMatrix projection = rows_of(wide, 0, basis_rows);
  auto s = backend.alloc(1, r, Format::f32);
  const auto rotate = [&](const Matrix& rotation, const Matrix& vectors) {
    auto rotated = backend.alloc(rotation.rows, vectors.cols, Format::f32);
    const Term product[] = {{rotation, Op::n, vectors, Op::n}};
    backend.gemm(product, {}, rotated.view());
    return rotated;
  };
  const auto factors = [&](const Matrix& rotation) {
    auto basis_factor = rotate(rotation, rows_of(basis, 0, basis_rows));
    auto wide_factor = rotate(rotation, projection);
    backend.orthonormalize(wide_factor.view(), 0, r, rank);  // divides by the singular values, safely where they are 0
    using Buffer = decltype(basis_factor);
    if (on_rows) return SvdFactors<Buffer>{std::move(basis_factor), std::move(s), std::move(wide_factor)};
    return SvdFactors<Buffer>{std::move(wide_factor), std::move(s), std::move(basis_factor)};
  };
  const auto leading = backend.alloc(r, basis_rows, Format::f32);
  backend.gram_svd(projection, rows_of(weighed, 0, basis_rows), 1 / unit, s.view(), leading.view());
  if (!moment) return factors(leading.view());
  // For C = U U^T W: its r rows U^T W are orthogonal to each other only in R's norm.
  const auto weighed_best = rotate(leading.view(), projection);
  const auto turn = backend.alloc(r, r, Format::f32);
  backend.gram_svd(weighed_best.view(), weighed_best.view(), 1 / unit, s.view(), turn.view());
  return factors(rotate(turn.view(), leading.view()).view());
}

inline void check_finite(const Largest& largest) {
  constexpr const char* kNeeded = ": contains NaN or Inf; a singular value decomposition needs finite values";
  PISSA_CHECK(std::isfinite(largest.weight), "weight", kNeeded);
  PISSA_CHECK(std::isfinite(largest.moment), "second_moment", kNeeded);
}

/// For a weight that may lack full rank, or for which assuming it has failed.
template <Backend B>
auto careful_svd(B& backend, const Matrix& w, std::int64_t r, const SvdOptions& options, const Matrix& moment,
                 const Largest& largest) {
  auto factors = svd_lowrank(backend, w, r, options, moment, largest, Rank::any);
  if (!backend.had_full_rank()) throw std::runtime_error("weight: its singular value decomposition did not converge");
  return factors;
}

}  // namespace detail

/// Computes the leading r singular triplets of a weight; with a second moment, those of the matrix C of rank r that
/// loses least of the outputs.
///
/// @param backend computes, and owns the memory of the result
/// @param w [out, in], any format; read in place, once per pass
/// @param r 1 to min(out, in)
/// @param options method, passes, seed
/// @param largest max_abs of w, if it is already known
/// @param moment [in, in] f32, symmetric and positive semi-definite, of any scale and rank; may be absent
/// @return SvdFactors: orthonormal rows, for any rank of w
/// @throws std::invalid_argument a bad rank or pass count; a moment of another shape; NaN or Inf in w or in it
/// @throws std::runtime_error a decomposition that does not converge
template <Backend B>
auto svd_lowrank(B& backend, const Matrix& w, std::int64_t r, const SvdOptions& options,
                 std::optional<float> largest = std::nullopt, const Matrix& moment = {}) {
  check_svd(w, r, options);
  check_second_moment(moment, w);
  const detail::Largest all{largest ? *largest : max_abs(backend, w), moment ? max_abs(backend, moment) : 0.0f};
  detail::check_finite(all);
  auto factors = detail::svd_lowrank(backend, w, r, options, moment, all, Rank::assumed_full);
  if (backend.had_full_rank()) return factors;
  return detail::careful_svd(backend, w, r, options, moment, all);
}

}  // namespace pissa
