// How a product's output is cut into blocks, one for each task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// The size of a block, at most kMc x kNc: rows are a multiple of a tile's, columns of 32.
struct Cut {
  std::int64_t rows = 0, cols = 0;
};

// A block is at least so large, unless the output is smaller: in narrower ones codes are decoded up to twice as slowly.
constexpr std::int64_t kLeastRows = 28, kLeastCols = 128;

/// How long `threads` threads take for blocks that each take one of them 1. With `uneven`, half of them take 2.
inline std::int64_t rounds_of(std::int64_t blocks, std::int64_t threads, bool uneven) {
  if (!uneven) return ceil_div(blocks, threads);
  const std::int64_t slow = threads / 2, fast = threads - slow;
  std::int64_t started = 0;
  for (std::int64_t time = 0;; ++time) {
    if ((started += fast) >= blocks) return time + 1;
    if (time % 2 == 0 && (started += slow) >= blocks) return time + 2;
  }
}

/// The cut of [m, n], both at least 1, that takes the threads the least time.
inline Cut best_cut(std::int64_t m, std::int64_t n, std::int64_t tile_rows, std::int64_t threads, bool uneven) {
  const auto step = [](std::int64_t size, std::int64_t pieces, std::int64_t multiple) {
    return ceil_div(ceil_div(size, pieces), multiple) * multiple;
  };
  const std::int64_t row_pieces = ceil_div(m, kMc / tile_rows * tile_rows), col_pieces = ceil_div(n, kNc);
  const std::int64_t most = std::max(3 * threads, row_pieces * col_pieces + threads);
  Cut best;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t i = row_pieces; i == row_pieces || (i * col_pieces <= most && i * kLeastRows <= m); ++i) {
    const std::int64_t rows = step(m, i, tile_rows);
    for (std::int64_t j = col_pieces; j == col_pieces || (i * j <= most && j * kLeastCols <= n); ++j) {
      const std::int64_t cols = step(n, j, 32);
      // Copying a row of the first operand takes as long as multiplying it with 18 columns, decoding a column of the
      // second as long as 16 rows (Zen 4: 3.5% and 3% of a block of 512 x 512).
      const std::int64_t block = rows * cols + 18 * rows + 16 * cols;
      const std::int64_t time = rounds_of(ceil_div(m, rows) * ceil_div(n, cols), threads, uneven) * block;
      if (time < least) least = time, best = {rows, cols};
    }
  }
  return best;
}

}  // namespace pissa::cpu
