// The CPU kernels as the backend sees them: a table of functions, one table per instruction set (isa.h picks one).
#pragma once

#include <cstdint>

#include "pissa/types.h"

namespace pissa::cpu {

/// Blocking of the GEMM, in elements: a task computes at most kMc x kNc of the output, kKc of the inner dimension at a
/// time. A's panel is 344 KB, B's 256 KB, the f32 accumulators 344 KB: together inside a Zen 4 core's 1 MB of L2.
/// kMc is a multiple of every kRows (14, 6, 4), kNc of every tile width (32, 16, 8).
inline constexpr std::int64_t kMc = 336;
inline constexpr std::int64_t kNc = 256;
inline constexpr std::int64_t kKc = 256;
inline constexpr std::int64_t kMaxTileRows = 14;

/// A thread's scratch memory, 64-byte aligned, allocated once.
struct Panels {
  float* a;    // kMc * kKc
  float* b;    // kKc * kNc
  float* c;    // kMc * kNc
  float* row;  // 32 * kKc: rows being transposed, or one decoded row of up to kNc
};

/// out = addend + sum of the terms + bias; addend [M, N] and bias [1, N] may be absent.
struct GemmProblem {
  const Term* terms;
  std::int64_t term_count;
  Matrix addend;
  Matrix bias;
  MutableMatrix out;
};

/// Rows [row, row + rows) and columns [col, col + cols) of an output.
struct Block {
  std::int64_t row, rows, col, cols;
};

struct Kernels {
  const char* isa;

  /// One block of the output, at most kMc x kNc. An element's value does not depend on how the output is cut.
  void (*gemm_block)(const GemmProblem& problem, const Block& block, const Panels& panels);

  /// out[0, count) = elements [col, col + count) of a row of the matrix, as f32.
  void (*decode)(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count, float* out);

  /// Rounds values to a codec (not nf4), to nearest, ties to even. `to` is where the first one goes.
  void (*encode)(const float* values, std::int64_t count, Codec codec, void* to);

  /// Largest |value|; NaN if any value is not finite.
  float (*max_abs)(const float* values, std::int64_t count);

  /// NF4 codes and absmax of whole blocks; only the last may be short. codes: nf4_bytes(count).
  void (*nf4_quantize)(const float* values, std::int64_t count, std::int64_t blocksize, std::uint8_t* codes,
                       float* absmax);

  /// gram[i * ld_gram + j] = <row i, row j> in f64, for i in [first, last) and j <= i.
  void (*gram)(const float* rows, std::int64_t cols, std::int64_t ld, std::int64_t first, std::int64_t last,
               double* gram, std::int64_t ld_gram);
};

namespace baseline {
const Kernels& kernels();
}
#if defined(PISSA_X86)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

}  // namespace pissa::cpu
