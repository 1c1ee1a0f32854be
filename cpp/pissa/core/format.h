// The formats of numbers: a table of their properties, and functions of it. It does not say how the codes of a
// quantised format become numbers; the format's own header (four_bits.h, int8.h, fp8.h, gguf.h) and one decode function
// in each backend do.
#pragma once

#include <cstdint>

// Functions used by the per-ISA kernels must be inlined. A shared out-of-line copy could be the AVX-512 one, which
// would be an illegal instruction on a machine without it.
#if defined(__GNUC__) || defined(__clang__)  // clang-cl defines only the latter
#define PISSA_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define PISSA_INLINE __forceinline
#else
#error "This compiler has no known way to force inlining; define PISSA_INLINE for it here."
#endif

namespace pissa {

/// The bits of a number, and a number from its bits.
PISSA_INLINE constexpr std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
PISSA_INLINE constexpr float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

/// How the numbers of a matrix are stored: three dense formats, formats of codes with scales, and, from q4_0 on, the
/// read-only blocks of GGUF files (gguf.h).
enum class Format : std::int32_t {
  f32,
  bf16,
  f16,
  nf4,
  int8,
  mxfp4,
  nvfp4,
  int4,
  fp8,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q8_0,
  q2_k,
  q3_k,
  q4_k,
  q5_k,
  q6_k,
  iq4_nl,
  iq4_xs,
  mxfp4_gguf
};

/// How many elements of a flattened matrix share a scale: a power of two from `least` to `most`, which if `in_row` must
/// not cross rows; or, if these are 0, the elements of a row.
struct BlockRule {
  std::int64_t least = 0;
  std::int64_t most = 0;
  std::int64_t usual = 0;
  bool in_row = false;

  /// Whether a block is a row.
  PISSA_INLINE constexpr bool by_row() const { return most == 0; }
};

/// The kind of a quantised format's scales. `nested`: a byte each (nested_scales.h), or f32. `e8m0`: a byte each,
/// 2^(byte - 127), NaN for 255. `e4m3`: a byte each, and a table with the values of 256 bytes. `bf16`: bf16, or f32.
/// `tiles`: f32, bf16 or e8m0, for blocks that may have several rows. `within`: inside each block of codes; nothing
/// beside them.
enum class ScaleKind : std::uint8_t { f32, nested, e8m0, e4m3, bf16, tiles, within };

/// The properties of a format.
struct FormatInfo {
  const char* name = "";
  int bits = 0;                       ///< of an element, or of its code
  bool quantized = false;             ///< codes and scales; quantised matrices are read-only and contiguous
  BlockRule blocks = {};              ///< of a quantised format
  ScaleKind scales = ScaleKind::f32;  ///< nested ones may also be f32
  int block_bytes = 0;                ///< of a block with its scales, if they are within
};

/// A row of the table for blocks of GGUF: codes of `bits` bits, in blocks of `elements` elements and `bytes` bytes.
PISSA_INLINE constexpr FormatInfo blocks_within(const char* name, int bits, std::int64_t elements, int bytes) {
  return {name, bits, true, {elements, elements, elements, true}, ScaleKind::within, bytes};
}

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
      return {"nf4", 4, true, {32, 4096, 64}, ScaleKind::nested};
    case Format::int8:
      return {"int8", 8, true};
    case Format::mxfp4:
      return {"mxfp4", 4, true, {32, 32, 32, true}, ScaleKind::e8m0};
    case Format::nvfp4:
      return {"nvfp4", 4, true, {16, 16, 16, true}, ScaleKind::e4m3};
    case Format::int4:
      return {"int4", 4, true, {32, 128, 64, true}, ScaleKind::bf16};
    case Format::fp8:
      return {"fp8", 8, true, {}, ScaleKind::tiles};
    case Format::q4_0:
      return blocks_within("q4_0", 4, 32, 18);
    case Format::q4_1:
      return blocks_within("q4_1", 4, 32, 20);
    case Format::q5_0:
      return blocks_within("q5_0", 5, 32, 22);
    case Format::q5_1:
      return blocks_within("q5_1", 5, 32, 24);
    case Format::q8_0:
      return blocks_within("q8_0", 8, 32, 34);
    case Format::q2_k:
      return blocks_within("q2_k", 2, 256, 84);
    case Format::q3_k:
      return blocks_within("q3_k", 3, 256, 110);
    case Format::q4_k:
      return blocks_within("q4_k", 4, 256, 144);
    case Format::q5_k:
      return blocks_within("q5_k", 5, 256, 176);
    case Format::q6_k:
      return blocks_within("q6_k", 6, 256, 210);
    case Format::iq4_nl:
      return blocks_within("iq4_nl", 4, 32, 18);
    case Format::iq4_xs:
      return blocks_within("iq4_xs", 4, 256, 136);
    case Format::mxfp4_gguf:
      return blocks_within("mxfp4_gguf", 4, 32, 17);
  }
  return {};
}

/// The rows of the table.
inline constexpr Format kFormats[] = {Format::f32,    Format::bf16,      Format::f16,  Format::nf4,  Format::int8,
                                      Format::mxfp4,  Format::nvfp4,     Format::int4, Format::fp8,  Format::q4_0,
                                      Format::q4_1,   Format::q5_0,      Format::q5_1, Format::q8_0, Format::q2_k,
                                      Format::q3_k,   Format::q4_k,      Format::q5_k, Format::q6_k, Format::iq4_nl,
                                      Format::iq4_xs, Format::mxfp4_gguf};

/// Whether the format is one of codes and scales.
PISSA_INLINE constexpr bool is_quantized(Format format) { return info(format).quantized; }

/// Whether the format is read but never written.
PISSA_INLINE constexpr bool is_read_only(Format format) { return info(format).scales == ScaleKind::within; }

/// Bytes of an element of a dense format.
PISSA_INLINE constexpr std::int64_t element_size(Format format) { return info(format).bits / 8; }

PISSA_INLINE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Bytes of `count` elements or codes, which share bytes if they are smaller. In every format a block takes whole
/// bytes, and so does a row whose blocks are rows. With scales within, those of the blocks before element `count`.
/// `QuantFormat.tensors` (python/pissa/ops/formats.py) computes the same.
PISSA_INLINE constexpr std::int64_t code_bytes(Format format, std::int64_t count) {
  const FormatInfo row = info(format);
  return row.block_bytes > 0 ? count / row.blocks.usual * row.block_bytes : ceil_div(count * row.bits, 8);
}

/// Whether a matrix with `cols` columns can be quantised in blocks of that size. (FP8 that was quantised elsewhere may
/// have others; see Scales.)
constexpr bool is_blocksize(Format format, std::int64_t blocksize, std::int64_t cols) {
  const BlockRule rule = info(format).blocks;
  if (rule.by_row()) return blocksize == cols && cols > 0;
  if (rule.in_row && cols % blocksize != 0) return false;
  return blocksize >= rule.least && blocksize <= rule.most && (blocksize & (blocksize - 1)) == 0;
}

/// Divisors are never below this, so that an all-zero block needs no special case (a denormal: bitsandbytes' value).
inline constexpr float kSmallestAbsmax = 1e-38f;

/// A value divided by its block's scale, which may be anything: a nested scale may be 0 or negative.
PISSA_INLINE constexpr float over_scale(float value, float scale) {
  return (scale < 0.0f ? -scale : scale) < kSmallestAbsmax ? 0.0f : value / scale;
}

}  // namespace pissa
