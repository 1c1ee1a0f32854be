// Elementwise work on dense matrices, in runs of a row that fit the stack.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/parallel.h"

namespace pissa::cpu {

/// The largest number of elements in a run.
inline constexpr std::int64_t kRun = 1024;

inline char* element(const MutableMatrix& matrix, std::int64_t row, std::int64_t col) {
  return static_cast<char*>(matrix.data) + (row * matrix.ld + col) * element_size(matrix.format);
}
/// The same for a read-only matrix, dense.
inline const char* element(const Matrix& matrix, std::int64_t row, std::int64_t col) {
  return static_cast<const char*>(matrix.data) + (row * matrix.ld + col) * element_size(matrix.format);
}

/// Calls f(row, first column, count) for all runs of the matrix.
template <class F>
void for_each_run(const Executor& executor, const Matrix& matrix, F f) {
  const std::int64_t runs = ceil_div(matrix.cols, kRun);
  parallel_for(executor, matrix.rows * runs, 8 * matrix.rows * matrix.cols, [&](std::int64_t i) {
    const std::int64_t col = i % runs * kRun;
    f(i / runs, col, std::min(kRun, matrix.cols - col));
  });
}

/// The elements of a dense matrix without gaps as one row. For a matrix [out, 16], starting a row takes as long as 100
/// elements.
inline Matrix as_row(const Matrix& matrix) {
  const std::int64_t count = matrix.rows * matrix.cols;
  return {matrix.data, 1, count, count, matrix.format};
}
inline MutableMatrix as_row(const MutableMatrix& matrix) {
  const std::int64_t count = matrix.rows * matrix.cols;
  return {matrix.data, 1, count, count, matrix.format};
}

}  // namespace pissa::cpu
