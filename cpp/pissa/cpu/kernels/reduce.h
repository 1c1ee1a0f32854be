// Reductions: the largest absolute value, the Gram matrix. Included only by kernels.cc.
#pragma once

#include "pissa/cpu/kernels/dense.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Absolute values compare like their bits, and values that are not finite are above all others.
float max_abs(const float* values, std::int64_t count) {
  Vec::Reg largest = Vec::zero();
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) largest = Vec::max_bits(largest, Vec::abs(Vec::load(values + i)));
  if (i < count) {
    float last[kWidth] = {};
    __builtin_memcpy(last, values + i, (count - i) * sizeof *last);
    largest = Vec::max_bits(largest, Vec::abs(Vec::load(last)));
  }
  return Vec::reduce_max_bits(largest);
}

// gram[i, j] += <a_i, b_j> over a range of columns, in f64, for a tile of the lower triangle: j <= i + offset.
template <int rows, int cols>
void gram_tile(const float* a, const float* b, std::int64_t ld, std::int64_t count, std::int64_t offset, double* gram,
               std::int64_t ld_gram) {
  constexpr int kWidth64 = kWidth / 2;
  Vec::Reg64 sum[rows][cols];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero64();
  }
  std::int64_t k = 0;
  for (; k + kWidth64 <= count; k += kWidth64) {
    Vec::Reg64 b_k[cols];
    for (int j = 0; j < cols; ++j) b_k[j] = Vec::load64(b + j * ld + k);
    for (int i = 0; i < rows; ++i) {
      const Vec::Reg64 a_k = Vec::load64(a + i * ld + k);
      for (int j = 0; j < cols; ++j) sum[i][j] = Vec::fma64(a_k, b_k[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols && j <= i + offset; ++j) {
      double lanes[kWidth64];
      Vec::store64(lanes, sum[i][j]);
      double total = 0.0;
      for (int lane = 0; lane < kWidth64; ++lane) total += lanes[lane];
      for (std::int64_t tail = k; tail < count; ++tail) total += double{a[i * ld + tail]} * double{b[j * ld + tail]};
      gram[i * ld_gram + j] += total;
    }
  }
}

// The same for `rows` rows, starting at row `first`, and all columns up to the diagonal.
template <int rows>
void gram_rows(const float* data, const float* others, std::int64_t ld, std::int64_t k, std::int64_t count,
               std::int64_t first, double* gram, std::int64_t ld_gram) {
  const float* a = data + first * ld + k;
  double* to = gram + first * ld_gram;
  const std::int64_t cols = first + rows;
  std::int64_t j = 0;
  for (; j + 4 <= cols; j += 4) gram_tile<rows, 4>(a, others + j * ld + k, ld, count, first - j, to + j, ld_gram);
  for (; j < cols; ++j) gram_tile<rows, 1>(a, others + j * ld + k, ld, count, first - j, to + j, ld_gram);
}

void gram(const float* rows, const float* others, std::int64_t cols, std::int64_t ld, std::int64_t first,
          std::int64_t last, double* gram, std::int64_t ld_gram) {
  constexpr int kTile = Vec::kRegisters == 32 ? 4 : 2;  // times 4: 16 of 32 registers accumulate, or 8 of 16
  constexpr std::int64_t kChunk = 512;                  // 8 rows of it stay in L1
  for (std::int64_t i = first; i < last; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) gram[i * ld_gram + j] = 0.0;
  }
  for (std::int64_t k = 0; k < cols; k += kChunk) {
    const std::int64_t count = smaller(kChunk, cols - k);
    std::int64_t i = first;
    for (; i + kTile <= last; i += kTile) gram_rows<kTile>(rows, others, ld, k, count, i, gram, ld_gram);
    for (; i < last; ++i) gram_rows<1>(rows, others, ld, k, count, i, gram, ld_gram);
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
