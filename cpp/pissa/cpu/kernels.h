// The CPU kernels as used by the backend: a table of functions, one table per instruction set (isa.h chooses one).
#pragma once

#include <cstdint>

#include "pissa/core/merge_codes.h"
#include "pissa/core/score_state.h"
#include "pissa/core/types.h"

namespace pissa::cpu {

/// Blocking of the GEMM: a task computes at most kMc x kNc of the output, with kKc words of the inner dimension at a
/// time. A word is one f32 or two bf16: kKc holds 576 columns of a weight and 64 of an adapter in bf16. The panel of B
/// is 640 KB and stays in L2; the f32 accumulators are 1 MB. kMc is a multiple of AVX-512's tile_rows; that of the
/// others leaves a short last tile.
inline constexpr std::int64_t kMc = 518;
inline constexpr std::int64_t kNc = 512;
inline constexpr std::int64_t kKc = 320;
inline constexpr std::int64_t kPanelPad = 17;    // words at most from one strip of a panel to the next
inline constexpr std::int64_t kStripRows = 32;   // of A: at most a tile's, rounded up to a square for transposition
inline constexpr std::int64_t kDotRows = 16;     // the most rows that are multiplied without a panel
inline constexpr std::int64_t kCodeDotRows = 4;  // and up to this many directly by a quantised weight's codes

/// A thread's scratch memory, 64-byte aligned, allocated once.
struct Panels {
  float* a;        // kStripRows * (kKc + 16): a strip of A
  float* b;        // (kKc + kPanelPad) * kNc
  float* c;        // (kMc + kStripRows) * kNc: whole squares are read when it is stored transposed
  float* scratch;  // 32 * kKc: data about to be transposed
  float* b_row;    // kNc: a pair of rows about to be interleaved
  float* bias;     // kNc
};

/// Elements of the inner dimension that have one scale in a product of integers: of rows of the first operand; and of
/// columns of op(b) at most.
inline constexpr std::int64_t kByteRun = 64, kMostByteBlock = 256;

/// How an inner dimension, at least 1, is cut into blocks in which columns of op(b) have one scale: equally, in whole
/// runs.
struct ByteBlocks {
  std::int64_t count, size;

  explicit constexpr ByteBlocks(std::int64_t inner)
      : count(ceil_div(inner, kMostByteBlock)), size(ceil_div(ceil_div(inner, count), kByteRun) * kByteRun) {}

  constexpr std::int64_t length() const { return count * size; }
};

/// Rows in bytes, with zeros after the last up to a whole block: element k of row i is
/// scales[i * runs + k / kByteRun] * bytes[i * length + k]. Columns apart, in ascending order, are zeros there, and
/// floats of their own [rows, apart_count].
struct ByteRows {
  ByteBlocks blocks;
  const std::int64_t* apart;
  std::int64_t apart_count;
  float* of_apart;
  std::int8_t* bytes;
  float* scales;
  std::int32_t* starts;  // for each scale: what its sum of products starts with, if a weight's bytes have an offset

  std::int64_t length() const { return blocks.length(); }
  std::int64_t runs() const { return length() / kByteRun; }
};

/// out = addend + sum of the terms + bias; addend [M, N] and bias [1, N] may be absent. For a transposed problem,
/// element [i, j] is stored at [j, i]: out has the shape of the result and the leading dimension of its transpose. If
/// `out` has no memory, a block's elements stay in Panels::c, f32, with rows kNc apart.
struct GemmProblem {
  const Term* terms;
  std::int64_t term_count;
  Matrix addend;
  Matrix bias;
  MutableMatrix out;
  bool transposed = false;
  const ByteRows* rounded = nullptr;  // the first term's a, if that term's precision is int8
};

/// Rows [row, row + rows) and columns [col, col + cols) of an output.
struct Block {
  std::int64_t row, rows, col, cols;
};

struct Kernels {
  const char* isa;
  bool bf16;               // whether Precision::bf16 rounds operands to bf16 here; without such units it is f32
  int bytes;               // the largest byte of a weight in Precision::int8; 0: it does not multiply so
  bool matrix_units;       // tile registers or a BLAS multiply, which requires a self-test (choice.h)
  bool any_cut;            // whether an element's value does not depend on how the output is cut
  std::int64_t tile_rows;  // of the GEMM's register tile; a block with a multiple of them has no short tile

  /// One block of the output, at most kMc x kNc.
  void (*gemm_block)(const GemmProblem& problem, const Block& block, const Panels& panels);

  /// Rounds a row, times scale, to bytes: to the nearest, ties to even, the largest of a run to 127. What is not finite
  /// makes the row's products so. Null if `bytes` is 0.
  void (*round_row)(const Matrix& a, std::int64_t row, float scale, const ByteRows& to);

  /// out[0, count) = elements [col, col + count) of a row of the matrix, as f32.
  void (*decode)(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count, float* out);

  /// out[i] = element columns[i] of a row of the matrix, as f32, for `count` of them.
  void (*decode_columns)(const Matrix& matrix, std::int64_t row, const std::int64_t* columns, std::int64_t count,
                         float* out);

  /// Rounds values to a dense format, to nearest, ties to even. `to` is the destination of the first one.
  void (*encode)(const float* values, std::int64_t count, Format format, void* to);

  /// Largest |value|; not finite if any value is not.
  float (*max_abs)(const float* values, std::int64_t count);

  /// Codes and scales of whole blocks in a quantised format. Only the last block may be short. codes:
  /// code_bytes(count). global: see QuantOutput.
  void (*quantize)(Format format, const float* values, std::int64_t count, std::int64_t blocksize, float global,
                   std::uint8_t* codes, float* scales);

  /// Backend::quantize_columns for rows [row, row + rows); reciprocals: 1 / lower[j, j] of the columns.
  void (*quantize_columns)(const Matrix& w, const Matrix& lower, const float* reciprocals, Format format,
                           const Scales& scales, std::int64_t row, std::int64_t rows, std::int64_t first,
                           const MutableMatrix& errors, std::uint8_t* codes);

  /// CpuBackend::merge_codes for elements [col, col + count) of a row, whose change is given. `col` is that of a block.
  void (*merge_codes)(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count, const float* change,
                      Rounding rounding, std::uint64_t seed, std::uint8_t* codes, MergeSums& sums);

  /// The same by error feedback, for at most kMergeRun elements. `change` is overwritten by what the codes lack of it,
  /// and `sum`, of the products of later elements' errors and their rows of `lower`, is added to.
  void (*merge_columns)(const Matrix& weight, const Matrix& lower, std::int64_t row, std::int64_t col,
                        std::int64_t count, float* change, float* sum, Rounding rounding, std::uint64_t seed,
                        std::uint8_t* codes, MergeSums& sums);

  /// Backend::add_scores for one row. `label` counts from the first of the logits, and may be outside them. Returns the
  /// factor of what was summed before.
  float (*add_scores)(float* logits, std::int64_t count, std::int64_t label, float scale, float cap, bool gradient,
                      ScoreState& state);

  /// Turns a row of products [count] into exp(scale * product - m), where m is the largest scale * product, and into 0
  /// where mask is 0, if there is a mask, whose last number is not. share: 1 / their sum, which makes them the softmax;
  /// 0 of nothing. Returns the logarithm of the sum of exp(scale * product); -infinity of nothing. All -infinity: NaN.
  float (*softmax_row)(float* row, std::int64_t count, const std::uint8_t* mask, float scale, float* share);

  /// The same row again, given that logarithm: products become the softmax p, and dp becomes scale * p * (dp - less).
  void (*softmax_backward_row)(float* row, float* dp, std::int64_t count, const std::uint8_t* mask, float log_sum,
                               float less, float scale);

  /// gate becomes f(gate) * up.
  void (*gated)(float* gate, const float* up, std::int64_t count, Activation activation);

  /// gate and up become their gradients.
  void (*gated_backward)(const float* dy, float* gate, float* up, std::int64_t count, Activation activation);

  /// to[j * rows + i] = from[i * cols + j].
  void (*transpose)(const float* from, std::int64_t rows, std::int64_t cols, float* to);

  /// The same rounded to bf16, for a multiple of 32 rows. Null unless `bf16`.
  void (*transpose_to_bf16)(const float* from, std::int64_t rows, std::int64_t cols, void* to);

  /// gram[i * ld_gram + j] = <row i, other j> in f64, for i in [first, last) and j <= i; `others` may be `rows`.
  void (*gram)(const float* rows, const float* others, std::int64_t cols, std::int64_t ld, std::int64_t first,
               std::int64_t last, double* gram, std::int64_t ld_gram);
};

namespace baseline {
const Kernels& kernels();
}
#if defined(PISSA_ARM)
namespace neondot {
const Kernels& kernels();
}
namespace neonbf16 {
const Kernels& kernels();
}
#endif
#if defined(PISSA_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avxvnni {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512vnni {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();
}
namespace amxbf16 {
const Kernels& kernels();
}
#endif

}  // namespace pissa::cpu
