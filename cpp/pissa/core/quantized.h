// Quantised matrices as outputs: the destinations of their parts, the runs of blocks in which they are computed, and
// the check of their block size.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pissa/core/error.h"
#include "pissa/core/format.h"
#include "pissa/core/types.h"

namespace pissa {

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
