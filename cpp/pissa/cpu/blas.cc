#include "pissa/cpu/blas.h"

#include <algorithm>
#include <span>

#include "pissa/cpu/backend.h"

namespace pissa::cpu {
namespace {

constexpr std::int64_t kBlasRows = 32;                                   // not measured on a Mac
constexpr int kRowMajor = 101, kNotTransposed = 111, kTransposed = 112;  // as in cblas.h

struct Panel {
  const float* data;
  int ld;
};

// Rows [row, row + rows) and columns [col, col + cols) of a matrix in f32: where they are, or decoded into `room`.
Panel panel(const Kernels& kernels, const Matrix& matrix, std::int64_t row, std::int64_t rows, std::int64_t col,
            std::int64_t cols, float* room) {
  if (matrix.format == Format::f32) {
    return {static_cast<const float*>(matrix.data) + row * matrix.ld + col, static_cast<int>(matrix.ld)};
  }
  for (std::int64_t i = 0; i < rows; ++i) kernels.decode(matrix, row + i, col, cols, room + i * cols);
  return {room, static_cast<int>(cols)};
}

// sums += the term's product
void add_product(Sgemm sgemm, const Kernels& kernels, const Term& term, const Block& block, const Panels& panels,
                 const MutableMatrix& sums) {
  const Buffer room(kMc, kKc);
  for (std::int64_t k0 = 0, depth; k0 < term.inner(); k0 += depth) {
    depth = std::min(kKc, term.inner() - k0);
    const auto operand = [&](const Matrix& matrix, bool across, std::int64_t lead, std::int64_t count, float* to) {
      return across ? panel(kernels, matrix, k0, depth, lead, count, to)
                    : panel(kernels, matrix, lead, count, k0, depth, to);
    };
    const Panel a = operand(term.a, term.op_a == Op::t, block.row, block.rows, static_cast<float*>(room.view().data));
    const Panel b = operand(term.b, term.op_b == Op::n, block.col, block.cols, panels.b);
    sgemm(kRowMajor, term.op_a == Op::t ? kTransposed : kNotTransposed,
          term.op_b == Op::t ? kTransposed : kNotTransposed, static_cast<int>(block.rows), static_cast<int>(block.cols),
          static_cast<int>(depth), term.scale, a.data, a.ld, b.data, b.ld, 1.0f, static_cast<float*>(sums.data),
          static_cast<int>(sums.ld));
  }
}

}  // namespace

void gemm_block_by(Sgemm sgemm, const Kernels& kernels, const GemmProblem& problem, const Block& block,
                   const Panels& panels) {
  const std::span<const Term> terms(problem.terms, problem.term_count);
  const auto rounded = [&](const Term& term) { return kernels.bf16 && term.precision == Precision::bf16; };
  if (problem.out.rows < kBlasRows || std::ranges::any_of(terms, rounded)) {
    return kernels.gemm_block(problem, block, panels);
  }
  const Buffer buffer(block.rows, block.cols);
  const MutableMatrix sums = buffer.view();
  for (std::int64_t i = 0; i < block.rows; ++i) {
    float* row = static_cast<float*>(sums.data) + i * sums.ld;
    if (problem.addend) kernels.decode(problem.addend, block.row + i, block.col, block.cols, row);
    else std::fill_n(row, block.cols, 0.0f);
  }
  for (const Term& term : terms) add_product(sgemm, kernels, term, block, panels, sums);

  // Without a term, the kernels add the bias, round and store.
  MutableMatrix out = problem.out;
  if (out) {
    const std::int64_t row = problem.transposed ? block.col : block.row;
    const std::int64_t col = problem.transposed ? block.row : block.col;
    out = cols_of(rows_of(out, row, block.rows), col, block.cols);
  }
  out.rows = block.rows;
  out.cols = block.cols;
  const Matrix bias = problem.bias ? cols_of(problem.bias, block.col, block.cols) : Matrix{};
  kernels.gemm_block({nullptr, 0, sums, bias, out, problem.transposed}, {0, block.rows, 0, block.cols}, panels);
}

Kernels with_blas(const char* isa, const Kernels& kernels, decltype(Kernels::gemm_block) gemm_block) {
  Kernels table = kernels;
  table.isa = isa;
  table.matrix_units = true;
  table.bytes = 0;  // whether these are faster than a BLAS's products in f32 is not measured
  table.any_cut = false;
  table.gemm_block = gemm_block;
  return table;
}

}  // namespace pissa::cpu
