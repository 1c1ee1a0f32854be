// How a product's output is cut into blocks, one for each task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// The size of a block, at most kMc x kNc: rows are a multiple of a tile's, columns of those given.
struct Cut {
  std::int64_t rows = 0, cols = 0;
};

// Of what the columns of a block are a multiple: two vectors or, where they are columns of codes, what one step decodes
// to bf16. A row's elements beside whole steps are decoded one by one, which took 30% of the backward of 16 tokens for
// a weight [576, 576] in nf4, cut into halves (Zen 4).
constexpr std::int64_t kColumns = 32, kColumnsOfCodes = 64;

/// The columns of which those of a problem's blocks are a multiple.
inline std::int64_t columns_of(const GemmProblem& problem) {
  for (const Term& term : std::span(problem.terms, static_cast<std::size_t>(problem.term_count))) {
    if (term.op_b == Op::n && is_quantized(term.b.format)) return kColumnsOfCodes;
  }
  return kColumns;
}

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

/// The cut of [m, n], both at least 1, that takes the threads the least time, in multiples of tile_rows and `columns`.
inline Cut best_cut(std::int64_t m, std::int64_t n, std::int64_t tile_rows, std::int64_t columns, std::int64_t threads,
                    bool uneven) {
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
      const std::int64_t cols = step(n, j, columns);
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
