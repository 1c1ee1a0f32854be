// The formats of numbers: a table of what is to be known of each, and what follows from it. How the codes of a
// quantised format become numbers is no part of it: the format's own header (nf4.h, int8.h) and one decode function a
// backend know that.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
// Functions used by the per-ISA kernels must be inlined: a shared out-of-line copy could be the AVX-512 one, and
// would then run, as an illegal instruction, on a machine without it.
#define PISSA_INLINE inline __attribute__((always_inline))
#else
#define PISSA_INLINE inline
#endif

namespace pissa {

/// How the numbers of a matrix are stored: three dense formats, and four of codes with scales.
enum class Format : std::int32_t { f32, bf16, f16, nf4, int8, nf3, nf2 };

/// How many elements of a flattened matrix share a scale: a power of two from `least` to `most`; or, where these are 0,
/// the elements of a row.
struct BlockRule {
  std::int64_t least = 0;
  std::int64_t most = 0;
  std::int64_t usual = 0;

  /// Whether a block is a row.
  PISSA_INLINE constexpr bool by_row() const { return most == 0; }
};

/// What is to be known of a format.
struct FormatInfo {
  const char* name = "";
  int bits = 0;            ///< of an element, or of its code
  bool quantized = false;  ///< codes and scales; quantised matrices are read-only, and contiguous
  BlockRule blocks = {};   ///< of a quantised format
  bool nested = false;     ///< whether its scales may be quantised too
};

/// The table.
PISSA_INLINE constexpr FormatInfo info(Format format) {
  switch (format) {
    case Format::f32:
      return {"f32", 32};
    case Format::bf16:
      return {"bf16", 16};
    case Format::f16:
      return {"f16", 16};
    case Format::nf4:
      return {"nf4", 4, true, {32, 4096, 64}, true};
    case Format::int8:
      return {"int8", 8, true};
    case Format::nf3:
      return {"nf3", 3, true, {32, 4096, 64}, true};
    case Format::nf2:
      return {"nf2", 2, true, {32, 4096, 64}, true};
  }
  return {};
}

/// Its rows.
inline constexpr Format kFormats[] = {Format::f32,  Format::bf16, Format::f16, Format::nf4,
                                      Format::int8, Format::nf3,  Format::nf2};

/// Whether the format is one of codes and scales.
PISSA_INLINE constexpr bool is_quantized(Format format) { return info(format).quantized; }

/// Bytes of an element of a dense format.
PISSA_INLINE constexpr std::int64_t element_size(Format format) { return info(format).bits / 8; }

PISSA_INLINE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Bytes of `count` elements or codes, which share bytes where they are smaller. A block takes whole bytes in every
/// format, and a row of blocks that are rows: `QuantFormat.tensors` (python/pissa/ops/formats.py) says the same.
PISSA_INLINE constexpr std::int64_t code_bytes(Format format, std::int64_t count) {
  return ceil_div(count * info(format).bits, 8);
}

/// Whether blocks of that size exist in the format, for matrices with `cols` columns.
constexpr bool is_blocksize(Format format, std::int64_t blocksize, std::int64_t cols) {
  const BlockRule rule = info(format).blocks;
  if (rule.by_row()) return blocksize == cols && cols > 0;
  return blocksize >= rule.least && blocksize <= rule.most && (blocksize & (blocksize - 1)) == 0;
}

}  // namespace pissa
