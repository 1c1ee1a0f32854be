// One block of a GEMM's output. Included by kernels.cc only.
//
// Goto's scheme: a panel of B, decoded once for all rows of the block, stays in L2; A is copied strip by strip, each
// just before it is used, so that it is in L1; a tile of the output is accumulated in registers over the panel's depth
// and added to the block's f32 accumulators, which are rounded once, at the end.
#pragma once

#include "pissa/cpu/kernels/few_rows.h"
#include "pissa/cpu/kernels/micro_kernel.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Strips of `width` lanes, `stride` words apart, a word of every lane and then the next; zeros in lanes that there are
// not. across: whether the slice's rows run across the inner dimension.
template <class Product, int width>
void pack_lanes(const Slice& slice, bool across, std::int64_t stride, float* strips, const Panels& panels) {
  if (across) return rows_across_inner<Product, width>(slice, width, stride, strips, panels.scratch);
  constexpr int kPerWord = Product::kPerWord;
  const std::int64_t length = words<Product>(slice.depth);
  const bool plain =
      is_plain<Product>(slice) && slice.depth % (kPerWord * kWidth) == 0 && slice.matrix.ld % kPerWord == 0;
  for (std::int64_t lane = 0; lane < slice.count; lane += kWidth) {
    const Slice rows{slice.matrix, slice.lead + lane, smaller(kWidth, slice.count - lane),
                     slice.k0,     slice.depth,       slice.scale};
    float* to = strips + lane / width * stride + lane % width;
    if (plain && rows.count == kWidth) {
      for (int i = 0; i < kWidth; ++i) prefetch(slice.matrix, rows.lead + i, slice.k0, slice.depth);
      const auto* from = reinterpret_cast<const float*>(plain_row<Product>(slice, rows.lead, slice.k0));
      transpose(from, slice.matrix.ld / kPerWord, length, to, width);
    } else {
      rows_along_inner<Product>(rows, kWidth, kKc, panels.scratch);
      transpose(panels.scratch, kKc, length, to, width);
    }
  }
  for (std::int64_t lane = ceil_div(slice.count, kWidth) * kWidth; lane % width != 0; lane += kWidth) {
    float* to = strips + lane / width * stride + lane % width;
    for (std::int64_t k = 0; k < length; ++k) Vec::store(to + k * width, Vec::zero());
  }
}

template <class Product, int rows>
void pack_a(const Term& term, const Slice& slice, const Panels& panels) {
  static_assert(rows <= kStripRows);
  if constexpr (Vec::kByLane) {
    return pack_lanes<Product, rows>(slice, term.op_a == Op::t, 0, panels.a, panels);
  } else {
    constexpr int kLanes = static_cast<int>(ceil_div(rows, kTileCols)) * kTileCols;  // to be transposed
    if (term.op_a == Op::n) return rows_along_inner<Product>(slice, slice.count, kStripLd, panels.a);
    const std::int64_t length = words<Product>(slice.depth);
    rows_across_inner<Product, kLanes>(slice, kLanes, 0, panels.scratch, panels.b_row);
    for (std::int64_t k = 0; k < length; k += kWidth) {
      transpose(panels.scratch + k * kLanes, kLanes, rows, panels.a + k, kStripLd);
    }
  }
}

// Zeros behind `length` words, up to `whole` ones, in each strip of B or row of A, `count` of them.
PISSA_INLINE void pad_words(std::int64_t length, std::int64_t whole, std::int64_t width, std::int64_t count,
                            std::int64_t stride, float* to) {
  for (std::int64_t i = 0; length < whole && i < count; ++i) {
    __builtin_memset(to + i * stride + length * width, 0, (whole - length) * width * sizeof *to);
  }
}

// c = or += the term
template <class Product, int vecs>
void multiply(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  constexpr int kCols = vecs * kWidth;
  constexpr int kRows = Product::Tiles::kRows;
  const std::int64_t inner = term.inner();
  const typename Product::Tiles tiles;
  for (std::int64_t k0 = 0; k0 < inner; k0 += kKc * Product::kPerWord) {
    const std::int64_t depth = smaller(kKc * Product::kPerWord, inner - k0);
    const std::int64_t length = words<Product>(depth);
    // Strips a little more than 32 KB apart: a row that is dealt out to all of them touches as many sets of L1.
    const std::int64_t stride = ceil_div(length, kWidth) * kWidth * kCols + kCols;
    pack_lanes<Product, kCols>({term.b, block.col, block.cols, k0, depth}, term.op_b == Op::n, stride, panels.b,
                               panels);
    const std::int64_t whole = ceil_div(length, Product::Tiles::kDepth) * Product::Tiles::kDepth;
    pad_words(length, whole, kCols, ceil_div(block.cols, kCols), stride, panels.b);
    for (std::int64_t i = 0; i < block.rows; i += kRows) {
      const std::int64_t rows = smaller(kRows, block.rows - i);
      pack_a<Product, kRows>(term, {term.a, block.row + i, rows, k0, depth, term.scale}, panels);
      pad_words(length, whole, 1, rows, kStripLd, panels.a);
      const float* b = panels.b;
      for (std::int64_t j = 0; j < block.cols; j += kCols, b += stride) {
        multiply_tile<Product, vecs>(tiles, rows, whole, panels.a, b, panels.c + i * kNc + j, accumulate);
      }
    }
    accumulate = true;
  }
}

template <class Product>
void multiply(const Term& term, const Block& block, const Panels& panels, bool accumulate, std::int64_t rows) {
  if (is_quantized(term.b.format) && with_codes(term.b.format, [&](auto codes) {
        const bool dots = codes.template dots<Product>(term, rows);
        if (dots) codes.template dot<Product>(term, block, panels, accumulate);
        return dots;
      })) {
    return;
  }
  if (is_few_rows(term, rows)) multiply_few_rows<Product>(term, block, panels, accumulate);
  // Tile registers add in another order: where a narrow block comes from how the output is cut, that must not be seen.
  else if (block.cols <= kWidth && !Product::Tiles::kMultiply) multiply<Product, 1>(term, block, panels, accumulate);
  else multiply<Product, 2>(term, block, panels, accumulate);
}

char* element(const MutableMatrix& out, std::int64_t offset) {
  return static_cast<char*>(out.data) + offset * element_size(out.format);
}

// Rounds the block's accumulators and stores them at [j, i].
void store_transposed(const GemmProblem& problem, const Block& block, const Panels& panels) {
  // kWidth of the block's columns, as far apart as whole squares of the most rows reach
  constexpr std::int64_t kLd = ceil_div(kMc, kWidth) * kWidth;
  float* columns = panels.b;
  for (std::int64_t j = 0; j < block.cols; j += kWidth) {
    for (std::int64_t i = 0; i < block.rows; i += kWidth) {
      transpose(panels.c + i * kNc + j, kNc, kWidth, columns + i, kLd);
    }
    for (std::int64_t k = 0; k < smaller(kWidth, block.cols - j); ++k) {
      const std::int64_t offset = (block.col + j + k) * problem.out.ld + block.row;
      encode(columns + k * kLd, block.rows, problem.out.format, element(problem.out, offset));
    }
  }
}

void gemm_block(const GemmProblem& problem, const Block& block, const Panels& panels) {
  bool accumulate = static_cast<bool>(problem.addend);
  if (accumulate) {
    for (std::int64_t i = 0; i < block.rows; ++i) {
      decode(problem.addend, block.row + i, block.col, block.cols, panels.c + i * kNc);
    }
  }
  for (const Term* term = problem.terms; term != problem.terms + problem.term_count; ++term) {
    if (term->inner() == 0) continue;
    const std::int64_t rows = problem.out.rows;  // not the block's: how the output is cut must not matter
#if PISSA_HAS_BF16
    if (term->precision == Precision::bf16) multiply<Bf16>(*term, block, panels, accumulate, rows);
    else
#endif
      multiply<F32>(*term, block, panels, accumulate, rows);
    accumulate = true;
  }
  for (std::int64_t i = 0; !accumulate && i < block.rows; ++i) {
    __builtin_memset(panels.c + i * kNc, 0, block.cols * sizeof(float));
  }
  if (!problem.out) return;
  if (problem.transposed) return store_transposed(problem, block, panels);
  float* bias = panels.b;
  if (problem.bias) decode(problem.bias, 0, block.col, block.cols, bias);
  for (std::int64_t i = 0; i < block.rows; ++i) {
    float* c = panels.c + i * kNc;
    for (std::int64_t j = 0; problem.bias && j < block.cols; ++j) c[j] += bias[j];
    encode(c, block.cols, problem.out.format, element(problem.out, (block.row + i) * problem.out.ld + block.col));
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
