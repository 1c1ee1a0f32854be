// x W^T for few rows of x: dot products along the rows of W. Included only by kernels.cc.
//
// A panel would be transposed only to be read once or twice. Instead, a few rows of W are decoded into L1 and
// multiplied by all rows of x, a tile of kFewTileRows x kFewCols sums at a time, so that each loaded vector is used in
// several products.
#pragma once

#include "pissa/cpu/kernels/pack.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr int kFewTileRows = Vec::kRegisters == 32 ? 8 : 4;
constexpr int kFewCols = Vec::kRegisters == 32 ? 3 : 2;
constexpr std::int64_t kFewWords = 2048;         // along the rows at a time: 24 KB of W in L1
constexpr std::int64_t kFewLd = kFewWords + 16;  // 11 rows 8 KB apart would share the 8 ways of L1
static_assert(kFewCols * kFewLd <= 32 * kKc && kDotRows * kFewLd <= kNc * kKc);

// With fewer elements, adding up the lanes of the sums takes longer than the products.
constexpr std::int64_t kFewLeastInner = 512;

// c[rows, cols] = or += x[rows, length] w[cols, length]^T, all with rows kFewLd apart; length is in whole vectors.
template <class Product, int rows, int cols>
void few_tile(std::int64_t length, const float* x, const float* w, float* c, bool accumulate) {
  Vec::Reg sum[rows][cols];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero();
  }
  for (std::int64_t k = 0; k < length; k += kWidth) {
    Vec::Reg w_k[cols];
    for (int j = 0; j < cols; ++j) w_k[j] = Vec::load(w + j * kFewLd + k);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vec::Reg x_k = Vec::load(x + i * kFewLd + k);
      for (int j = 0; j < cols; ++j) sum[i][j] = Product::mac(x_k, w_k[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      const float total = Vec::reduce_add(sum[i][j]);
      c[i * kNc + j] = accumulate ? c[i * kNc + j] + total : total;
    }
  }
}

template <class Product, int cols, int rows = kFewTileRows>
PISSA_INLINE void dispatch_tile(std::int64_t wanted, std::int64_t length, const float* x, const float* w, float* c,
                                bool accumulate) {
  if (wanted == rows) return few_tile<Product, rows, cols>(length, x, w, c, accumulate);
  if constexpr (rows > 1) dispatch_tile<Product, cols, rows - 1>(wanted, length, x, w, c, accumulate);
}

// Rows [lead, lead + count) of the matrix as words, padded with zeros to a whole vector.
template <class Product>
void padded_rows(const Slice& slice, float* to) {
  const std::int64_t length = words<Product>(slice.depth);
  rows_along_inner<Product>(slice, slice.count, kFewLd, to);
  for (std::int64_t i = 0; length % kWidth != 0 && i < slice.count; ++i) {
    __builtin_memset(to + i * kFewLd + length, 0, (kWidth - length % kWidth) * sizeof(float));
  }
}

// Registers of tiles (AMX) multiply up to 16 rows in the time of one, so that the panel pays from fewer rows on: 16
// rows by a weight [4096, 4096] took 4.8 ms in place of 7.3, 8 rows between 0.9 and 1.2 of the time.
template <class Product>
constexpr std::int64_t kMostDotRows = Product::Tiles::kRows > Vec::kRows ? 8 : kDotRows;

template <class Product>
bool is_few_rows(const Term& term, std::int64_t rows) {
  return rows <= kMostDotRows<Product> && term.op_a == Op::n && term.op_b == Op::t && term.inner() >= kFewLeastInner;
}

// c = or += the term. If it is the first one, INT8 codes only need a conversion: a row's scale multiplies its sums.
template <class Product>
void multiply_few_rows(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  const std::int64_t inner = term.inner();
  const bool codes = term.b.format == Format::int8 && !accumulate;
  const std::int64_t tile_rows = ceil_div(block.rows, ceil_div(block.rows, kFewTileRows));
  for (std::int64_t k0 = 0; k0 < inner; k0 += kFewWords * Product::kPerWord) {
    const std::int64_t depth = smaller(kFewWords * Product::kPerWord, inner - k0);
    const std::int64_t length = ceil_div(words<Product>(depth), kWidth) * kWidth;
    padded_rows<Product>({term.a, block.row, block.rows, k0, depth, term.scale}, panels.b);
    for (std::int64_t j = 0; j < block.cols; j += kFewCols) {
      const std::int64_t cols = smaller(kFewCols, block.cols - j);
      padded_rows<Product>({term.b, block.col + j, cols, k0, depth, 1.0f, codes}, panels.scratch);
      for (std::int64_t i = 0; i < block.rows; i += tile_rows) {
        const std::int64_t rows = smaller(tile_rows, block.rows - i);
        const float* x = panels.b + i * kFewLd;
        float* c = panels.c + i * kNc + j;
        if (cols == kFewCols) {
          dispatch_tile<Product, kFewCols>(rows, length, x, panels.scratch, c, accumulate);
        } else {
          for (std::int64_t one = 0; one < cols; ++one) {
            dispatch_tile<Product, 1>(rows, length, x, panels.scratch + one * kFewLd, c + one, accumulate);
          }
        }
      }
    }
    accumulate = true;
  }
  for (std::int64_t i = 0; codes && i < block.rows; ++i) {
    const float* scales = term.b.scales.absmax + block.col;
    float* c = panels.c + i * kNc;
    for (std::int64_t j = 0; j < block.cols; ++j) c[j] = int8_element(c[j], scales[j]);
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
