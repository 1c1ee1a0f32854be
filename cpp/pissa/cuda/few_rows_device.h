// What the kernels for few rows share, of dense factors (few_rows.cu) and of a quantised weight (few_rows_of.h).
// Included by .cu files only.
#pragma once

#include "pissa/cuda/few_rows_launches.h"
#include "pissa/cuda/reduce_device.h"

namespace pissa::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

// Where a row is whole lines: one, but of blocks that are smaller.
constexpr int scales_of_line(Format format) {
  const int least = static_cast<int>(info(format).blocks.least);
  return least > 0 && least < kLine ? kLine / least : 1;
}

// values[i] = elements [col, col + 8) of row `row + i * step`; zeros beyond the matrix.
template <int n>
__device__ __forceinline__ void load_rows(const Matrix& matrix, std::int64_t row, std::int64_t step, std::int64_t col,
                                          float (&values)[n][kOctet]) {
  const std::int64_t left = matrix.cols - col;
  std::int64_t firsts[n];
  int counts[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    firsts[i] = (row + i * step) * matrix.ld + col;
    counts[i] = left <= 0 || row + i * step >= matrix.rows ? 0 : left < kOctet ? static_cast<int>(left) : kOctet;
  }
  load_octets(matrix.data, matrix.format, firsts, counts, values);
}

template <int n>
__device__ __forceinline__ void load_rounded(const Matrix& matrix, std::int64_t row, std::int64_t col, float scale,
                                             Format format, float (&values)[n][kOctet]) {
  load_rows(matrix, row, 1, col, values);
#pragma unroll
  for (auto& octet : values) {
#pragma unroll
    for (float& value : octet) value = rounded(scale * value, format);
  }
}

template <class Sum>
__device__ __forceinline__ void finish(const Sum& sum, int row, std::int64_t col, float value) {
  if (sum.addend) value += load(sum.addend.data, sum.addend.format, row * sum.addend.ld + col);
  if (sum.bias) value += load(sum.bias.data, sum.bias.format, col);
  store(sum.out.data, sum.out.format, row * sum.out.ld + col, value);
}

// ---- The layers of a group ---------------------------------------------------------------------------------------
// blockIdx.y is a layer, blockIdx.z a tile of its rows.

__device__ __forceinline__ Matrix rows_from(Matrix matrix, std::int64_t first, int rows) {
  matrix.data = static_cast<const char*>(matrix.data) + first * matrix.ld * dense_size(matrix.format);
  matrix.rows = rows;
  return matrix;
}

// The sum of a block's tile of `most` rows of its layer.
struct LayerSum {
  const Group& group;
  const LayerFactors& layer;
  std::int64_t first;
  int rows;  // none, or fewer, beyond the layer's
  int count;
  Matrix addend, bias;  // none
  MutableMatrix out;

  __device__ __forceinline__ LayerSum(const Group& group_, int most)
      : group(group_),
        layer(group_.layers[blockIdx.y]),
        first(layer.first + static_cast<std::int64_t>(blockIdx.z) * most),
        rows(min(layer.rows - static_cast<int>(blockIdx.z) * most, most)),
        count(group_.sum.count),
        out(group_.sum.out) {
    out.data = static_cast<char*>(out.data) + first * out.ld * dense_size(out.format);
    out.rows = rows;
  }
  __device__ __forceinline__ Term term(int i) const {
    Term result = group.sum.terms[0];
    result.a = rows_from(result.a, first, rows);
    result.b.data = layer.data[i];
    return result;
  }
};

}  // namespace
}  // namespace pissa::cuda
