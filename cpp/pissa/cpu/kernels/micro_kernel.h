// The micro-kernel of the GEMM: a tile of the output in registers, over the depth of a panel. Included only by
// kernels.cc.
//
// A strip of B contains a word of every column, one after the other, then the next word of every column. A strip of A
// is read in the order in which its words become factors: row by row if they are broadcast when loaded; or, if they are
// lanes of a register (Vec::kByLane), a word of every row, as in B. Tiles take a multiple of Tiles::kDepth words of
// both strips, after Tiles::arrange.
#pragma once

#include "pissa/cpu/kernels/pack.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr int kTileCols = 2 * kWidth;
constexpr std::int64_t kStripLd = kKc + 16;          // rows 21 lines apart: 14 of them in 14 different sets of L1
constexpr int kRowStep = Vec::kByLane ? kWidth : 1;  // a short last tile has a multiple; rows that A lacks are zero
static_assert(kNc % kTileCols == 0 && Vec::kRows <= kStripRows && kKc % kWidth == 0 && Vec::kRows % kRowStep == 0);

// sum[i, j] += a[i] * b[j] for rows from `row` on, each a lane of a
template <class Product, int row, int rows, int vecs>
PISSA_INLINE void mac_by_lane(const Vec::Reg (&a)[rows / kRowStep], const Vec::Reg (&b)[vecs],
                              typename Product::Sum (&sum)[rows][vecs]) {
  for (int j = 0; j < vecs; ++j) {
    sum[row][j] = Product::template mac_lane<row % kRowStep>(a[row / kRowStep], b[j], sum[row][j]);
  }
  if constexpr (row + 1 < rows) mac_by_lane<Product, row + 1, rows>(a, b, sum);
}

// sum += one word of a_strip * one of b_strip
template <class Product, int rows, int vecs>
PISSA_INLINE void mac_by_lane(const float* a, const float* b, typename Product::Sum (&sum)[rows][vecs]) {
  Vec::Reg a_k[rows / kRowStep];
  Vec::Reg b_k[vecs];
  for (int i = 0; i < rows / kRowStep; ++i) a_k[i] = Vec::load(a + i * kWidth);
  for (int j = 0; j < vecs; ++j) b_k[j] = Vec::load(b + j * kWidth);
  mac_by_lane<Product, 0, rows>(a_k, b_k, sum);
}

// sum += a_strip * b_strip
template <class Product, int rows, int vecs>
PISSA_INLINE void accumulate_tile(std::int64_t length, const float* a, const float* b,
                                  typename Product::Sum (&sum)[rows][vecs]) {
  if constexpr (Product::kByLane) {
    constexpr int kUnroll = 8;
    std::int64_t k = 0;
    for (; k + kUnroll <= length; k += kUnroll, a += kUnroll * Vec::kRows, b += kUnroll * vecs * kWidth) {
#pragma GCC unroll 8
      for (int i = 0; i < kUnroll; ++i) mac_by_lane<Product>(a + i * Vec::kRows, b + i * vecs * kWidth, sum);
    }
    for (; k < length; ++k, a += Vec::kRows, b += vecs * kWidth) mac_by_lane<Product>(a, b, sum);
  } else {
    for (std::int64_t k = 0; k < length; ++k, b += vecs * kWidth) {
      Vec::Reg b_k[vecs];
      for (int j = 0; j < vecs; ++j) b_k[j] = Vec::load(b + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vec::Reg a_ik = Vec::broadcast(a[i * kStripLd + k]);
        for (int j = 0; j < vecs; ++j) sum[i][j] = Product::mac(a_ik, b_k[j], sum[i][j]);
      }
    }
  }
}

// c[rows, vecs * kWidth] = or += a_strip * b_strip; length is at least 1.
template <class Product, int rows, int vecs>
void micro_kernel(std::int64_t length, const float* a, const float* b, float* c, std::int64_t ld_c, bool accumulate) {
  if (length < 1) __builtin_unreachable();  // otherwise GCC keeps zeros for this case in memory, 2% of the time
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vecs * kWidth; j += 16) __builtin_prefetch(c + i * ld_c + j, 1);
  }
  Vec::Reg sum[rows][vecs];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vecs; ++j) sum[i][j] = Vec::zero();
  }
  accumulate_tile<Product, rows, vecs>(length, a, b, sum);
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vecs; ++j) {
      float* to = c + i * ld_c + j * kWidth;
      Vec::store(to, accumulate ? Vec::add(Vec::load(to), sum[i][j]) : sum[i][j]);
    }
  }
}

template <int rows>
struct RowCount {
  static constexpr int kRows = rows;
};

// Calls kernel(RowCount) for the number of rows left in a tile, rounded up to the step; c has memory for them.
template <int rows = Vec::kRows, int step = kRowStep, class Kernel>
PISSA_INLINE void dispatch_rows(std::int64_t wanted, const Kernel& kernel) {
  if constexpr (rows > step) {
    if (wanted <= rows - step) return dispatch_rows<rows - step, step>(wanted, kernel);
  }
  kernel(RowCount<rows>{});
}

// c[rows, vecs * kWidth] = or += a_strip * b_strip, for up to Tiles::kRows rows. The rows of c below them may change.
template <class Product, int vecs>
PISSA_INLINE void multiply_tile([[maybe_unused]] const typename Product::Tiles& tiles, std::int64_t rows,
                                std::int64_t length, const float* a, const float* b, float* c, std::int64_t ld_c,
                                bool accumulate) {
  if constexpr (Product::Tiles::kMultiply) {
    tiles.multiply(rows, length, a, kStripLd, b, c, ld_c, accumulate);
  } else {
    dispatch_rows(rows, [&](auto count) {
      micro_kernel<Product, decltype(count)::kRows, vecs>(length, a, b, c, ld_c, accumulate);
    });
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
