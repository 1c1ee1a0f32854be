// One block of a GEMM's output. Included only by kernels.cc.
//
// Goto's scheme: a panel of B, decoded once for all rows of the block, stays in L2. A is copied strip by strip, each
// just before it is used, so that it is in L1. A tile of the output is accumulated in registers over the panel's depth
// and added to the block's f32 accumulators. A strip's rows are rounded and stored as soon as their sums are complete.
#pragma once

#include "pissa/cpu/kernels/bytes.h"
#include "pissa/cpu/kernels/few_rows.h"
#include "pissa/cpu/kernels/micro_kernel.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Strips of `width` lanes, `stride` words apart: a word of every lane, then the next word. Missing lanes are zero.
// across: whether the slice's rows run across the inner dimension.
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
    if (rows.count == kWidth && decoded_lanes<Product>(rows, panels.scratch, to, width)) continue;
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

// A strip of A, starting at its word `at`.
template <class Product, int rows>
void pack_a(const Term& term, const Slice& slice, std::int64_t at, const Panels& panels) {
  static_assert(rows <= kStripRows);
  if constexpr (Vec::kByLane) {
    return pack_lanes<Product, rows>(slice, term.op_a == Op::t, 0, panels.a + at * rows, panels);
  } else {
    constexpr int kLanes = static_cast<int>(ceil_div(rows, kTileCols)) * kTileCols;  // to be transposed
    if (term.op_a == Op::n) return rows_along_inner<Product>(slice, slice.count, kStripLd, panels.a + at);
    const std::int64_t length = words<Product>(slice.depth);
    rows_across_inner<Product, kLanes>(slice, kLanes, 0, panels.scratch, panels.b_row);
    for (std::int64_t k = 0; k < length; k += kWidth) {
      transpose(panels.scratch + k * kLanes, kLanes, rows, panels.a + at + k, kStripLd);
    }
  }
}

// Writes zeros after `length` words, up to `whole` words, in each of `count` strips of B or rows of A.
PISSA_INLINE void pad_words(std::int64_t length, std::int64_t whole, std::int64_t width, std::int64_t count,
                            std::int64_t stride, float* to) {
  for (std::int64_t i = 0; length < whole && i < count; ++i) {
    __builtin_memset(to + i * stride + length * width, 0, (whole - length) * width * sizeof *to);
  }
}

char* element(const MutableMatrix& out, std::int64_t offset) {
  return static_cast<char*>(out.data) + offset * element_size(out.format);
}

// Rounds the block's accumulators and stores them at [j, i].
void store_transposed(const GemmProblem& problem, const Block& block, const Panels& panels) {
  // kWidth of the block's columns, spaced for whole squares of the largest number of rows
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

// The initial values of a block's sums, and their destination.
class Output {
 public:
  Output(const GemmProblem& problem, const Block& block, const Panels& panels)
      : problem_(problem), block_(block), bias_(panels.bias) {
    if (problem.bias) decode(problem.bias, 0, block.col, block.cols, panels.bias);
  }
  // Sets rows of c, starting at row i of the block, to those of the addend, if there is one.
  void begin(std::int64_t i, std::int64_t rows, float* c) const {
    for (std::int64_t k = 0; has_addend() && k < rows; ++k) {
      decode(problem_.addend, block_.row + i + k, block_.col, block_.cols, c + k * kNc);
    }
  }
  // Called when rows of c are complete.
  void end(std::int64_t i, std::int64_t rows, float* c) const {
    for (std::int64_t k = 0; stored_by_row() && k < rows; ++k, c += kNc) {
      for (std::int64_t j = 0; problem_.bias && j < block_.cols; ++j) c[j] += bias_[j];
      encode(c, block_.cols, problem_.out.format,
             element(problem_.out, (block_.row + i + k) * problem_.out.ld + block_.col));
    }
  }
  // Where rows of the block may be summed as they are stored, without c: in f32, whole tiles, over the addend if there
  // is one. Otherwise null.
  float* in_place(std::int64_t i, std::int64_t rows, std::int64_t tile_rows, std::int64_t tile_cols) const {
    const MutableMatrix& out = problem_.out;
    const bool over = !has_addend() || (problem_.addend.data == out.data && problem_.addend.ld == out.ld);
    const bool whole = rows % tile_rows == 0 && block_.cols % tile_cols == 0;
    if (!stored_by_row() || out.format != Format::f32 || problem_.bias || !over || !whole) return nullptr;
    return reinterpret_cast<float*>(element(out, (block_.row + i) * out.ld + block_.col));
  }
  bool has_addend() const { return static_cast<bool>(problem_.addend); }
  bool stored_by_row() const { return problem_.out && !problem_.transposed; }
  std::int64_t ld() const { return problem_.out.ld; }

 private:
  const GemmProblem& problem_;
  const Block& block_;
  const float* bias_;
};

// Terms of one precision, multiplied as if they were one: their inner dimensions, in words, are concatenated.
struct Run {
  const Term* begin;
  const Term* end;
  bool first, last;  // whether the block's sums begin, and end, with this run

  // Calls visit(term, k0, depth, at) for the parts in words [from, from + length): elements [k0, k0 + depth) of a term,
  // after `at` words of those before it.
  template <class Product, class F>
  PISSA_INLINE void visit(std::int64_t from, std::int64_t length, F visit) const {
    std::int64_t start = 0;  // first word of the term
    for (const Term* term = begin; term != end; ++term) {
      const std::int64_t skipped = from > start ? from - start : 0;
      const std::int64_t k0 = skipped * Product::kPerWord;
      const std::int64_t depth = smaller((from + length - start) * Product::kPerWord, term->inner()) - k0;
      if (depth > 0) visit(*term, k0, depth, start + skipped - from);
      start += words<Product>(term->inner());
    }
  }
  template <class Product>
  std::int64_t length() const {
    std::int64_t total = 0;
    for (const Term* term = begin; term != end; ++term) total += words<Product>(term->inner());
    return total;
  }
};

// The depth of a panel in words: as few panels as possible, all about equally deep, in whole steps of 16 words, which
// contain two blocks of codes.
PISSA_INLINE std::int64_t panel_words(std::int64_t words) {
  constexpr std::int64_t kStep = 16, kMost = kKc - 32;
  const std::int64_t panels = words > kMost ? ceil_div(words, kMost) : 1;
  return ceil_div(ceil_div(words, panels), kStep) * kStep;
}

// How a run is cut into panels: its first term as if it were alone, so that terms that are 0 leave the bits of its sum.
// The others follow it in the last panel, if there is room for them.
struct PanelCut {
  std::int64_t lead, rest;  // words

  PISSA_INLINE std::int64_t length_at(std::int64_t from) const {
    if (from >= lead) return smaller(panel_words(rest), lead + rest - from);
    const std::int64_t length = smaller(panel_words(lead), lead - from);
    return from + length == lead && length + rest <= kKc ? length + rest : length;
  }
};

void add_nothing(const Run& run, const Block& block, const Panels& panels, const Output& output) {
  for (std::int64_t i = 0; run.first && i < block.rows; ++i) {
    __builtin_memset(panels.c + i * kNc, 0, block.cols * sizeof(float));
  }
  if (run.first) output.begin(0, block.rows, panels.c);
  if (run.last) output.end(0, block.rows, panels.c);
}

// Adds a run to the block's sums. If there is only one panel, every tile uses the accumulators of the first, which stay
// in L1; those of a block are 1 MB.
template <class Product, int vecs>
void multiply(const Run& run, const Block& block, const Panels& panels, const Output& output) {
  constexpr int kCols = vecs * kWidth;
  constexpr int kRows = Product::Tiles::kRows;
  const std::int64_t total = run.length<Product>();
  if (total == 0) return add_nothing(run, block, panels, output);
  const std::int64_t lead = words<Product>(run.begin->inner());
  const PanelCut cut{lead, total - lead};
  const bool once = run.first && run.last && cut.length_at(0) == total && output.stored_by_row();
  const typename Product::Tiles tiles;
  for (std::int64_t from = 0, length; from < total; from += length) {
    length = cut.length_at(from);
    const std::int64_t whole = ceil_div(length, Product::Tiles::kDepth) * Product::Tiles::kDepth;
    const bool begins = run.first && from == 0;
    const bool ends = run.last && from + length == total;
    // Strips are slightly more than 32 KB apart, so that a row that is distributed over all of them touches as many
    // sets of L1. They are no farther apart, so that the processor prefetches the next strip. A transposition fills
    // whole squares.
    std::int64_t room = whole;
    run.visit<Product>(from, length, [&](const Term&, std::int64_t, std::int64_t depth, std::int64_t at) {
      const std::int64_t filled = at + ceil_div(words<Product>(depth), kWidth) * kWidth;
      room = room < filled ? filled : room;
    });
    const std::int64_t stride = room * kCols + kCols;
    run.visit<Product>(from, length, [&](const Term& term, std::int64_t k0, std::int64_t depth, std::int64_t at) {
      pack_lanes<Product, kCols>({term.b, block.col, block.cols, k0, depth}, term.op_b == Op::n, stride,
                                 panels.b + at * kCols, panels);
    });
    const std::int64_t strips = ceil_div(block.cols, kCols);
    pad_words(length, whole, kCols, strips, stride, panels.b);
    Product::Tiles::arrange(whole, kCols, strips, stride, panels.b);
    for (std::int64_t i = 0; i < block.rows; i += kRows) {
      const std::int64_t rows = smaller(kRows, block.rows - i);
      constexpr std::int64_t kTileRows = Product::Tiles::kMultiply ? kRows : kRowStep;
      float* const stored = run.first && run.last ? output.in_place(i, rows, kTileRows, kCols) : nullptr;
      float* c = stored ? stored : panels.c + (once ? 0 : i * kNc);
      const std::int64_t ld_c = stored ? output.ld() : kNc;
      if (begins && !stored) output.begin(i, rows, c);
      run.visit<Product>(from, length, [&](const Term& term, std::int64_t k0, std::int64_t depth, std::int64_t at) {
        pack_a<Product, kRows>(term, {term.a, block.row + i, rows, k0, depth, term.scale}, at, panels);
      });
      if constexpr (Vec::kByLane) {
        pad_words(length, whole, kRows, 1, 0, panels.a);
        Product::Tiles::arrange(whole, kRows, 1, 0, panels.a);
      } else {
        pad_words(length, whole, 1, rows, kStripLd, panels.a);
      }
      const float* b = panels.b;
      for (std::int64_t j = 0; j < block.cols; j += kCols, b += stride) {
        multiply_tile<Product, vecs>(tiles, rows, whole, panels.a, b, c + j, ld_c, !begins || output.has_addend());
      }
      if (ends && !stored) output.end(i, rows, c);
    }
  }
}

// Whether a term is multiplied without a panel.
template <class Product>
bool is_direct(const Term& term, std::int64_t rows) {
  if (term.inner() == 0) return false;  // it would leave the sums as they were
  if (is_few_rows<Product>(term, rows)) return true;
  return is_quantized(term.b.format) &&
         with_codes(term.b.format, [&](auto codes) { return codes.template dots<Product>(term, rows); });
}

// c = or += the term
template <class Product>
void multiply_directly(const Term& term, const Block& block, const Panels& panels, bool accumulate, std::int64_t rows) {
  if (is_quantized(term.b.format) && with_codes(term.b.format, [&](auto codes) {
        const bool dots = codes.template dots<Product>(term, rows);
        if (dots) codes.template dot<Product>(term, block, panels, accumulate);
        return dots;
      })) {
    return;
  }
  multiply_few_rows<Product>(term, block, panels, accumulate);
}

// Adds terms, starting with `term`, as long as they are multiplied in the same way. Returns the first of the others.
template <class Product>
const Term* multiply(const GemmProblem& problem, const Term* term, const Block& block, const Panels& panels,
                     const Output& output) {
  const Term* const last = problem.terms + problem.term_count;
  const std::int64_t rows = problem.out.rows;  // not the block's, because how the output is cut must not affect results
  const bool first = term == problem.terms;
  if (term != last && is_direct<Product>(*term, rows)) {
    if (first) output.begin(0, block.rows, panels.c);
    multiply_directly<Product>(*term, block, panels, !first || output.has_addend(), rows);
    if (++term == last) output.end(0, block.rows, panels.c);
    return term;
  }
  const Term* end = term;
  while (end != last && end->precision == term->precision && !is_direct<Product>(*end, rows)) ++end;
  const Run run{term, end, first, end == last};
  // Tile registers add in another order. A narrow block may result from how the output is cut, which must not affect
  // bits.
  if (block.cols <= kWidth && !Product::Tiles::kMultiply) multiply<Product, 1>(run, block, panels, output);
  else multiply<Product, 2>(run, block, panels, output);
  return end;
}

void gemm_block(const GemmProblem& problem, const Block& block, const Panels& panels) {
  const Output output(problem, block, panels);
  const Term* term = problem.terms;
#if PISSA_HAS_BYTES
  if (problem.rounded) {
    multiply_bytes(*term, *problem.rounded, block, panels, problem.term_count == 1, output);
    if (problem.term_count == 1) return;
    ++term;
  }
#endif
  do {
#if PISSA_HAS_BF16
    if (problem.term_count > 0 && term->precision == Precision::bf16) {
      term = multiply<Bf16>(problem, term, block, panels, output);
      continue;
    }
#endif
    term = multiply<F32>(problem, term, block, panels, output);
  } while (term != problem.terms + problem.term_count);
  if (problem.transposed) store_transposed(problem, block, panels);
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
