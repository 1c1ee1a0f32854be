// The blocks of GGUF files (ggml-common.h of llama.cpp), byte for byte: codes with their scales inside the block. They
// run along the rows of a weight. Everything is little-endian. Codes may be replaced (merge_codes.h); scales are only
// read.
//
// A block consists of groups of 16 or 32 elements. An element is scale * code, or scale * code + minimum where the
// format has minima, each computed in f32. scale * code is exact, so a fused multiply-add gives the same bits.
//
// The codes of a run of elements are bits of consecutive bytes: element j of run r has bits of byte `low(r).byte + j`
// and, from five bits on, one or two high bits of another byte. A backend either asks for one code (gguf_code) or
// vectorises the runs.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

/// Bits of the bytes from `byte` of a block on: (block[byte + j] >> shift) & mask. Without a mask there are none.
struct BlockBits {
  int byte = 0;
  int shift = 0;
  int mask = 0;
};

/// The number in two bytes of a block, an IEEE half.
PISSA_INLINE constexpr float half_at(const std::uint8_t* block, int byte) {
  const std::uint32_t bits = block[byte] | static_cast<std::uint32_t>(block[byte + 1]) << 8;
  const std::uint32_t sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
  if (size < 0x400u) return float_of(bits_of(static_cast<float>(size) * 0x1p-24f) | sign);
  return float_of((size >= 0x7c00u ? 0x7f800000u | (size & 0x3ffu) << 13 : (size << 13) + (112u << 23)) | sign);
}

/// The levels of IQ4_NL and IQ4_XS, and twice those of E2M1.
inline constexpr std::int8_t kIq4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};
inline constexpr std::int8_t kTwiceE2m1Levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

/// What the layouts have in common unless they say otherwise. A group's scale is the half at byte kScale times
/// `scale_code`; its minimum is the half at byte kMinimum or, if it has codes, minus that half times `minimum_code`.
struct GgufDefaults {
  static constexpr int kScale = 0;
  static constexpr int kMinimum = -1;  ///< -1: the format has no minima
  static constexpr bool kMinimumHasCodes = false;
  static constexpr int kBias = 0;            ///< subtracted from a code
  static constexpr int kHighBits = 0;        ///< how far the high bits of a code are shifted to the left
  static constexpr int kFifthBits = 0;       ///< the byte from which on bit i is the fifth of element i; 0: none
  static constexpr bool kSixBits = false;    ///< codes of scales and minima are GgufSixBits'
  static constexpr bool kHasLevels = false;  ///< codes of four bits stand for `kLevels`; otherwise they are numbers
  static PISSA_INLINE constexpr BlockBits high(int) { return {}; }
  static PISSA_INLINE constexpr int scale_code(const std::uint8_t*, int) { return 1; }
};

/// Blocks of 32 elements: one group, whose codes of four bits begin at `codes`, 16 low nibbles before 16 high ones.
template <int codes>
struct Gguf32 : GgufDefaults {
  static constexpr int kGroup = 32;
  static constexpr int kRun = 16;
  static PISSA_INLINE constexpr BlockBits low(int run) { return {codes, 4 * run, 15}; }
};

template <Format format>
struct Gguf;

template <>
struct Gguf<Format::q4_0> : Gguf32<2> {
  static constexpr int kBias = 8;
};

template <>
struct Gguf<Format::q4_1> : Gguf32<4> {
  static constexpr int kMinimum = 2;
};

template <>
struct Gguf<Format::q5_0> : Gguf32<6> {
  static constexpr int kBias = 16;
  static constexpr int kFifthBits = 2;
};

template <>
struct Gguf<Format::q5_1> : Gguf32<8> {
  static constexpr int kMinimum = 2;
  static constexpr int kFifthBits = 4;
};

template <>
struct Gguf<Format::q8_0> : GgufDefaults {
  static constexpr int kGroup = 32;
  static constexpr int kRun = 32;
  static PISSA_INLINE constexpr BlockBits low(int) { return {2, 0, 255}; }  // signed
};

template <>
struct Gguf<Format::iq4_nl> : Gguf32<2> {
  static constexpr bool kHasLevels = true;
  static constexpr auto& kLevels = kIq4Levels;
};

/// The scale is a byte (`half_e8m0`).
template <>
struct Gguf<Format::mxfp4_gguf> : Gguf32<1> {
  static constexpr bool kHasLevels = true;
  static constexpr auto& kLevels = kTwiceE2m1Levels;
};

/// Blocks of 256 elements: eight runs of 32.
struct Gguf256 : GgufDefaults {
  static constexpr int kRun = 32;
};

template <>
struct Gguf<Format::q2_k> : Gguf256 {
  static constexpr int kScale = 80;
  static constexpr int kMinimum = 82;
  static constexpr bool kMinimumHasCodes = true;
  static constexpr int kGroup = 16;
  static PISSA_INLINE constexpr BlockBits low(int run) { return {16 + run / 4 * 32, run % 4 * 2, 3}; }
  static PISSA_INLINE constexpr int scale_code(const std::uint8_t* block, int group) { return block[group] & 15; }
  static PISSA_INLINE constexpr int minimum_code(const std::uint8_t* block, int group) { return block[group] >> 4; }
};

template <>
struct Gguf<Format::q3_k> : Gguf256 {
  static constexpr int kScale = 108;
  static constexpr int kGroup = 16;
  static constexpr int kBias = 4;
  static constexpr int kHighBits = 2;
  static PISSA_INLINE constexpr BlockBits low(int run) { return {32 + run / 4 * 32, run % 4 * 2, 3}; }
  static PISSA_INLINE constexpr BlockBits high(int run) { return {0, run, 1}; }
  static PISSA_INLINE constexpr int scale_code(const std::uint8_t* block, int group) {
    const int low = block[96 + group % 8] >> (group / 8 * 4) & 15;
    const int high = block[104 + group % 4] >> (group / 4 * 2) & 3;
    return (low | high << 4) - 32;
  }
};

/// Eight codes of scales and eight of minima, six bits each, in twelve bytes from the fifth on.
struct GgufSixBits : Gguf256 {
  static constexpr int kMinimum = 2;
  static constexpr bool kMinimumHasCodes = true;
  static constexpr bool kSixBits = true;
  static constexpr int kGroup = 32;
  static PISSA_INLINE constexpr int scale_code(const std::uint8_t* block, int group) {
    const std::uint8_t* bytes = block + 4;
    return group < 4 ? bytes[group] & 63 : (bytes[group + 4] & 15) | bytes[group - 4] >> 6 << 4;
  }
  static PISSA_INLINE constexpr int minimum_code(const std::uint8_t* block, int group) {
    const std::uint8_t* bytes = block + 4;
    return group < 4 ? bytes[group + 4] & 63 : bytes[group + 4] >> 4 | bytes[group] >> 6 << 4;
  }
};

template <>
struct Gguf<Format::q4_k> : GgufSixBits {
  static PISSA_INLINE constexpr BlockBits low(int run) { return {16 + run / 2 * 32, run % 2 * 4, 15}; }
};

template <>
struct Gguf<Format::q5_k> : GgufSixBits {
  static constexpr int kHighBits = 4;
  static PISSA_INLINE constexpr BlockBits low(int run) { return {48 + run / 2 * 32, run % 2 * 4, 15}; }
  static PISSA_INLINE constexpr BlockBits high(int run) { return {16, run, 1}; }
};

template <>
struct Gguf<Format::q6_k> : Gguf256 {
  static constexpr int kScale = 208;
  static constexpr int kGroup = 16;
  static constexpr int kBias = 32;
  static constexpr int kHighBits = 4;
  static PISSA_INLINE constexpr BlockBits low(int run) { return {run / 4 * 64 + run % 2 * 32, run % 4 / 2 * 4, 15}; }
  static PISSA_INLINE constexpr BlockBits high(int run) { return {128 + run / 4 * 32, run % 4 * 2, 3}; }
  static constexpr int kScaleCodes = 192;
  static PISSA_INLINE constexpr int scale_code(const std::uint8_t* block, int group) {
    return static_cast<std::int8_t>(block[kScaleCodes + group]);
  }
};

template <>
struct Gguf<Format::iq4_xs> : GgufDefaults {
  static constexpr bool kHasLevels = true;
  static constexpr auto& kLevels = kIq4Levels;
  static constexpr int kGroup = 32;
  static constexpr int kRun = 16;
  static PISSA_INLINE constexpr BlockBits low(int run) { return {8 + run / 2 * 16, run % 2 * 4, 15}; }
  static PISSA_INLINE constexpr int scale_code(const std::uint8_t* block, int group) {
    const int low = block[4 + group / 2] >> (group % 2 * 4) & 15;
    const int high = block[2 + group / 4] >> (group % 4 * 2) & 3;
    return (low | high << 4) - 32;
  }
};

/// 2^(byte - 128), half the value of E8M0. For 255, which is NaN there, llama.cpp has 2^127.
PISSA_INLINE constexpr float half_e8m0(std::uint8_t byte) {
  const std::uint32_t exponent = byte;
  return float_of(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
}

/// The level of a code. Kernels of a GPU cannot index a table of the host, so it is two constants.
template <Format format>
PISSA_INLINE constexpr int gguf_level(int code) {
  constexpr auto packed = [](int first) {
    std::uint64_t word = 0;
    for (int i = 0; i < 8; ++i) {
      word |= std::uint64_t{static_cast<std::uint8_t>(Gguf<format>::kLevels[first + i])} << (8 * i);
    }
    return word;
  };
  constexpr std::uint64_t kLow = packed(0), kHigh = packed(8);
  return static_cast<std::int8_t>((code < 8 ? kLow : kHigh) >> (code % 8 * 8));
}

/// The bits of the code of element i of a block.
template <Format format>
PISSA_INLINE constexpr int gguf_bits(const std::uint8_t* block, int i) {
  using Layout = Gguf<format>;
  const int run = i / Layout::kRun, j = i % Layout::kRun;
  const BlockBits low = Layout::low(run), high = Layout::high(run);
  int code = block[low.byte + j] >> low.shift & low.mask;
  if constexpr (Layout::kHighBits > 0) code |= (block[high.byte + j] >> high.shift & high.mask) << Layout::kHighBits;
  if constexpr (Layout::kFifthBits > 0) code |= (block[Layout::kFifthBits + i / 8] >> i % 8 & 1) << 4;
  return code;
}

/// Replaces the bits of `mask`, shifted, of a byte.
PISSA_INLINE constexpr void replace_bits(std::uint8_t& byte, int shift, int mask, int bits) {
  byte = static_cast<std::uint8_t>((byte & ~(mask << shift)) | (bits & mask) << shift);
}

/// The inverse of gguf_bits: replaces the code of element i.
template <Format format>
PISSA_INLINE constexpr void put_gguf_bits(std::uint8_t* block, int i, int code) {
  using Layout = Gguf<format>;
  const int run = i / Layout::kRun, j = i % Layout::kRun;
  const BlockBits low = Layout::low(run), high = Layout::high(run);
  replace_bits(block[low.byte + j], low.shift, low.mask, code);
  if constexpr (Layout::kHighBits > 0) {
    replace_bits(block[high.byte + j], high.shift, high.mask, code >> Layout::kHighBits);
  }
  if constexpr (Layout::kFifthBits > 0) replace_bits(block[Layout::kFifthBits + i / 8], i % 8, 1, code >> 4);
}

/// The number for which the bits of a code stand, which its group's scale multiplies.
template <Format format>
PISSA_INLINE constexpr int gguf_number(int code) {
  if constexpr (Gguf<format>::kHasLevels) return gguf_level<format>(code);
  else if constexpr (info(format).bits == 8) return static_cast<std::int8_t>(code);
  else return code - Gguf<format>::kBias;
}

/// The code of element i of a block as that number.
template <Format format>
PISSA_INLINE constexpr int gguf_code(const std::uint8_t* block, int i) {
  return gguf_number<format>(gguf_bits<format>(block, i));
}

/// A format as a type.
template <Format format>
struct GgufFormat {
  static constexpr Format kFormat = format;
};

/// Calls f with the GgufFormat of a read-only format: those from q4_0 on.
template <Format first = Format::q4_0, class F>
PISSA_INLINE auto with_gguf(Format format, F f) {
  if constexpr (first != Format::mxfp4_gguf) {
    if (format != first) return with_gguf<static_cast<Format>(static_cast<int>(first) + 1)>(format, f);
  }
  return f(GgufFormat<first>{});
}

/// Element `col` of a row of blocks.
template <Format format>
PISSA_INLINE constexpr float gguf_element(const std::uint8_t* row, std::int64_t col) {
  using Layout = Gguf<format>;
  constexpr int kElements = static_cast<int>(info(format).blocks.usual);
  const std::uint8_t* block = row + col / kElements * info(format).block_bytes;
  const int i = static_cast<int>(col % kElements);
  const int group = i / Layout::kGroup;
  const float code = static_cast<float>(gguf_code<format>(block, i));
  if constexpr (format == Format::mxfp4_gguf) return half_e8m0(block[0]) * code;
  const float product = half_at(block, Layout::kScale) * static_cast<float>(Layout::scale_code(block, group)) * code;
  if constexpr (Layout::kMinimumHasCodes) {
    return product - half_at(block, Layout::kMinimum) * static_cast<float>(Layout::minimum_code(block, group));
  } else if constexpr (Layout::kMinimum >= 0) {
    return product + half_at(block, Layout::kMinimum);
  } else {
    return product;
  }
}

}  // namespace pissa
