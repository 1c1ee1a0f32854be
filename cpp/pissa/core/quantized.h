// Parts of quantised matrices: rows to read, the destinations of outputs, the runs of blocks in which outputs are
// computed; and the check of the block size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "pissa/core/error.h"
#include "pissa/core/format.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/types.h"

namespace pissa {

/// The least number of rows, of a matrix in any format, that end where a block ends, and with nested scales a block of
/// blocks.
inline std::int64_t separable_rows(const Matrix& matrix) {
  if (!is_quantized(matrix.format) || matrix.cols == 0) return 1;
  if (info(matrix.format).scales == ScaleKind::tiles) return matrix.scales.rows;
  const std::int64_t span = matrix.scales.blocksize * (matrix.scales.nested_absmax ? kNestedBlocksize : 1);
  return span / std::gcd(span, matrix.cols);
}

/// Rows [first, first + count) of a matrix in any format; `first` is a multiple of `separable_rows`.
inline Matrix separate_rows(Matrix matrix, std::int64_t first, std::int64_t count) {
  if (!is_quantized(matrix.format)) return rows_of(matrix, first, count);
  Scales& scales = matrix.scales;
  const bool tiles = info(matrix.format).scales == ScaleKind::tiles;
  const std::int64_t blocks =
      tiles ? first / scales.rows * scales.across : first * matrix.cols / std::max<std::int64_t>(scales.blocksize, 1);
  matrix.data = static_cast<const char*>(matrix.data) + code_bytes(matrix.format, first * matrix.cols);
  matrix.rows = count;
  if (scales.absmax) scales.absmax += blocks;
  if (scales.absmax8) scales.absmax8 += blocks;
  if (scales.absmax16) scales.absmax16 += blocks;
  if (scales.nested_absmax) scales.nested_absmax += blocks / kNestedBlocksize;
  return matrix;
}

/// The destination of a quantised matrix [rows, cols].
struct QuantOutput {
  Format format;                  ///< a quantised one
  std::int64_t blocksize;         ///< elements that share a scale, as is_blocksize allows
  std::uint8_t* codes = nullptr;  ///< code_bytes(format, rows * cols) bytes; nf4: the first of two in the high nibble
  float* scales = nullptr;        ///< [ceil(rows * cols / blocksize)], as numbers, whatever the format stores
  const float* global = nullptr;  ///< for NVFP4, one number: scales times it are E4M3's

  /// The output starting at an element of the flattened matrix with which a block starts.
  PISSA_INLINE QuantOutput from(std::int64_t element) const {
    return {format, blocksize, codes + code_bytes(format, element), scales + element / blocksize, global};
  }
};

/// Throws unless blocks of that size exist in the format, for matrices with `cols` columns.
inline void check_blocksize(Format format, std::int64_t blocksize, std::int64_t cols) {
  if (is_blocksize(format, blocksize, cols)) return;
  const BlockRule rule = info(format).blocks;
  PISSA_CHECK(!rule.by_row(), "blocksize: got ", blocksize, "; allowed for ", info(format).name, ": ", cols,
              ", a row, of at least one element");
  PISSA_CHECK(!rule.in_row, "blocksize: got ", blocksize, " for rows of ", cols, "; allowed for ", info(format).name,
              ": a power of two from ", rule.least, " to ", rule.most, " that divides a row");
  PISSA_CHECK(false, "blocksize: got ", blocksize, "; allowed: a power of two from ", rule.least, " to ", rule.most);
}

/// Runs of whole blocks of a flattened matrix, with at least `least_rows` rows each. A block may start inside a row, so
/// the code that computes a run computes every row that it touches; its neighbours compute the first and the last one
/// too.
class BlockRuns {
 public:
  /// Elements [first, first + count), inside rows [first_row, first_row + rows).
  struct Run {
    std::int64_t first, count, first_row, rows;
    std::int64_t cols;

    /// Where in these rows the run starts.
    std::int64_t skip() const { return first - first_row * cols; }
  };

  BlockRuns(std::int64_t rows, std::int64_t cols, std::int64_t blocksize, std::int64_t least_rows)
      : cols_(cols), total_(rows * cols), length_(ceil_div(least_rows * cols, blocksize) * blocksize) {}

  std::int64_t count() const { return total_ == 0 ? 0 : ceil_div(total_, length_); }
  Run operator[](std::int64_t i) const {
    const std::int64_t first = i * length_;
    const std::int64_t count = std::min(length_, total_ - first);
    const std::int64_t first_row = first / cols_;
    return {first, count, first_row, ceil_div(first + count, cols_) - first_row, cols_};
  }

 private:
  std::int64_t cols_, total_, length_;
};

}  // namespace pissa
