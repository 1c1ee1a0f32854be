// The primitives that a device must provide. The core's algorithms are written over them, once.
//
// A backend owns none of the caller's data. Pointers passed to it belong to its device, and the algorithms never read
// through them. Values reach the host only through `read` and `had_full_rank`, which therefore synchronise; nothing
// else needs to. All thin matrices of the SVD are stored with one vector per row.
//
// A backend may represent a stack of equal problems, with one weight each. Every matrix that it allocates is then as
// many (`Matrix::stride`), and the algorithms do not notice.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "pissa/core/error.h"
#include "pissa/core/quantized.h"
#include "pissa/core/score_state.h"
#include "pissa/core/types.h"

namespace pissa {

/// The largest number of terms of a sum of products, and of thin ones in addition to the product with a weight.
inline constexpr std::size_t kMostTerms = 3;
inline constexpr std::size_t kMostTail = kMostTerms - 1;

/// The check that every backend makes before it adds up terms.
inline void check_terms(std::span<const Term> terms, std::size_t most = kMostTerms) {
  PISSA_CHECK(terms.size() <= most, "terms: got ", terms.size(), "; allowed: at most ", most);
}

// clang-format off
/// The operations that the algorithms need from a device.
template <class B>
concept Backend = requires(B backend, Matrix matrix, MutableMatrix out, std::span<const Term> terms, std::int64_t count,
                           std::uint64_t seed, float scale, Precision precision, Format format, const float* scales,
                           std::uint8_t* codes, float* nested, float* offset, QuantOutput quantized,
                           std::span<const Matrix> matrices, float* largest, double* squares, Scales given,
                           const std::int64_t* labels, bool gradient) {
  // A matrix [rows, cols], uninitialised, freed with the returned object; `.view()` is its MutableMatrix.
  { backend.alloc(count, count, format).view() } -> std::convertible_to<MutableMatrix>;

  // out = a, converted between formats. This also dequantises a quantised matrix.
  { backend.copy(matrix, out) };

  // out[i, :] = row labels[i] of a quantised matrix; its first row for one that it does not have.
  { backend.decode_rows(matrix, labels, out) };

  // out = a + b, elementwise, computed in f32. `out` may be `a`.
  { backend.add(matrix, matrix, out) };

  // out = a - b, elementwise, computed in f32, for a dense a and a b in any format. *squares = the sum of the squares
  // of the resulting `out`, in f64.
  { backend.subtract(matrix, matrix, out, squares) };

  // out[i, j] = scale * (+1 or -1): the sketch of philox.h, element i * cols + j.
  { backend.fill_signs(out, seed, scale) };

  // out[i, :] = sqrt(s[i] / divisor) * a[i, :], or, transposed, out[:, i] = the same. s: [1, a.rows] f32, not negative.
  { backend.scale_rows(matrix, matrix, scale, out, Op::n) };

  // out[i, :] = a[i, :] times the power of two that brings its largest |element| into [1, 2); rows of zeros stay. a: f32.
  { backend.normalize_rows(matrix, out) };

  // Whether products with a weight in that half precision, with the other factor rounded to it, are faster than in f32.
  { backend.multiplies_in(format) } -> std::same_as<bool>;

  // largest[i] = largest |element| of matrix i, of any format; not finite if any element is not.
  { backend.max_abs(matrices, largest) };

  // Copies `count` numbers out of the backend's memory, after everything before has been computed.
  { backend.read(scales, count) } -> std::same_as<std::vector<float>>;

  // out = addend + sum of at most kMostTerms terms, f32 accumulation, one rounding; the addend may be absent, and may
  // be `out`.
  { backend.gemm(terms, matrix, out) };

  // The same, quantised without being stored. The addend is given and dense, and the terms' first operands are not
  // transposed. The scale of a block that contains NaN is NaN; with Inf and no NaN it is Inf. Its codes are arbitrary.
  { backend.gemm_quantized(terms, matrix, quantized) };

  // Nested quantisation of `count` scales, at least one, minus their offset: codes [count], and a scale for every 256
  // of them. The offset is *given or, if that is null, the mean, summed in f64; it is written to *offset. The scale of
  // a value that is NaN after subtracting the offset is NaN.
  { backend.quantize_absmax(scales, count, scales, codes, nested, offset) };

  // Codes of columns [first, first + errors.cols) of a dense weight, with given scales, from the last column to the
  // first: element [i, j] is rounded to the level nearest to w[i, j] + (errors[i, j - first] + the sum over k > j in
  // these columns of d[i, k] lower[k, j]) / lower[j, j], and d[i, j] = w[i, j] - that level, which is written to
  // `errors`. A row ends with a whole byte, and the columns begin and end with one.
  { backend.quantize_columns(matrix, matrix, format, given, count, out, codes) };

  // y = x W^T + tail + bias and dx = dy W + tail: the GEMMs that read a weight [out, in] in any format. The tail is a
  // sum of at most kMostTail thin products, which add columns to the inner dimension. The factor `scale` multiplies x
  // or dy. bias: [1, out] or absent.
  { backend.weight_gemm_nt(matrix, matrix, scale, precision, terms, matrix, out) };
  { backend.weight_gemm_nn(matrix, matrix, scale, precision, terms, out) };

  // A weight for products of `count` rows, instead of the matrix: a device may decode it in parallel with what is
  // computed before them. It lives no longer than the backend.
  { backend.weight_gemm_nt(matrix, backend.decode_ahead(matrix, Op::t, precision, count), scale, precision, terms, matrix, out) };
  { backend.weight_gemm_nn(matrix, backend.decode_ahead(matrix, Op::n, precision, count), scale, precision, terms, out) };

  // Adds logits [tokens, n] f32, those of the vocabulary from row `count` on, to the tokens' ScoreState, which starts
  // here if `count` is 0. If the gradient is requested, the logits become exp(z - m) dz/dl, 0 for the label, and the
  // rows of `earlier` [tokens, in] f32, if it is given, are multiplied by exp(m before - m).
  { backend.add_scores(out, labels, count, scale, scale, out, out, gradient) };

  // scores [tokens, kScores] f32 of the tokens' ScoreState. If dx [tokens, in] is given, it becomes their gradient, from
  // the sum of exp(z - m) dz/dl times the weight's rows, f32, which may be dx itself, and the label's row of the weight.
  { backend.finish_scores(matrix, labels, matrix, scale, scale, out, matrix, out) };

  // The tokens that token_scores.h reads the vocabulary for at a time, and the bytes of f32 logits that it holds.
  { B::kScoredTokens } -> std::convertible_to<std::int64_t>;
  { B::kLogitBytes } -> std::convertible_to<std::int64_t>;

  // Makes rows [done, done + count) of `basis` orthonormal and orthogonal to rows [0, done), which are already
  // orthonormal and do not change. Rank-deficient or zero rows are completed to an orthonormal set. If full rank is
  // assumed, a backend may leave it to `had_full_rank` to detect that they did not have it.
  { backend.orthonormalize(out, count, count, Rank::any) };

  // Rows [done, done + count) of `basis` are orthonormal, and orthogonal to rows [0, done), except for rounding to half
  // precision. This makes them so in f32. The same rows of `companion`, which depend on them linearly, are combined in
  // the same way.
  { backend.reorthonormalize(out, out, count, count) };

  // Whether every assumption of full rank since the last call held. If not, the results since then are invalid.
  { backend.had_full_rank() } -> std::same_as<bool>;

  // Roots of the leading k eigenvalues of rows others^T, times scale, descending, in s [1, k] f32, and the
  // eigenvectors, one per row of `out` [k, rows]; in f64. The product is symmetric and positive semi-definite except
  // for rounding, and its lower triangle is used. With rows = others, these are the rows' singular values and left
  // singular vectors. Both matrices have the same distance between rows.
  { backend.gram_svd(matrix, matrix, scale, out, out) };
};

/// A backend that rounds the factors of products in half precision, so that sums of factors may be stored in it: two
/// sums at once, computed in f32, of which the second may be empty.
template <class B>
concept KeepsFactorSums = Backend<B> && requires(B backend, Sum sum) { backend.add_both(sum, sum); };

/// A backend that may multiply with a weight in integers, Precision::int8, if it says so for that many rows of the
/// first operand. Rows of it are rounded to the nearest in blocks of 64 to 256 elements of the inner dimension, which
/// share a scale: the block's largest element becomes 127. So is the weight, in the same blocks.
template <class B>
concept MultipliesBytes = Backend<B> && requires(B backend, std::int64_t rows) {
  { backend.multiplies_bytes(rows) } -> std::same_as<bool>;
};

/// A backend that can tell without waiting which rows of a dense matrix are not 0, ascending; take rows of a matrix; and
/// put them back in their places, with 0 in the other rows.
template <class B>
concept FindsZeroRows = Backend<B> && requires(B backend, Matrix matrix, MutableMatrix out,
                                               std::span<const std::int64_t> rows) {
  { backend.nonzero_rows(matrix) } -> std::same_as<std::vector<std::int64_t>>;
  { backend.take_rows(matrix, rows, out) };
  { backend.put_rows(matrix, rows, out) };
};
// clang-format on

}  // namespace pissa
