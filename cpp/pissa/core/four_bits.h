// The formats of four bits: 16 levels, two codes a byte; an element is its level times its block's scale. This header
// defines the levels, which of two codes comes first, and, for all except NF4 (nf4.h), how numbers become scales and
// codes.
//
//   nf4    NormalFloat, bitsandbytes' layout (nf4.h)
//   mxfp4  E2M1 with a power of two for 32 (OCP Microscaling Formats 1.0), as gpt-oss and compressed-tensors store it
//   nvfp4  E2M1 with an E4M3 for 16, times a number for all, as compressed-tensors and ModelOpt store it
//   int4   integers from -8 to 7 with a bf16 for 32, 64 or 128 (compressed-tensors' "pack-quantized", symmetric; its
//          32-bit words are, in memory, these bytes)
#pragma once

#include <cstdint>

#include "pissa/core/format.h"
#include "pissa/core/fp8.h"
#include "pissa/core/nf4.h"

namespace pissa {

template <Format format>
struct FourBits;

template <>
struct FourBits<Format::nf4> {
  static constexpr auto& kLevels = kNf4Levels;
  static constexpr bool kLowFirst = false;  ///< whether the first of two codes is in the low nibble
};

/// E2M1: a sign and the levels 0, 1/2, 1, 3/2, 2, 3, 4, 6.
inline constexpr float kE2m1Levels[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                          -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

/// To nearest, ties to the even code; values beyond 6 give 6.
PISSA_INLINE constexpr std::uint8_t e2m1_code(float value) {
  const float size = value < 0.0f ? -value : value;
  const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) +
                   (size >= 3.5f) + (size > 5.0f);
  return static_cast<std::uint8_t>(code | static_cast<int>(bits_of(value) >> 31) << 3);
}

template <>
struct FourBits<Format::mxfp4> {
  static constexpr auto& kLevels = kE2m1Levels;
  static constexpr bool kLowFirst = true;
  /// A quarter of the largest element, rounded to a power of two, up from 7/4 on. Values that are then beyond 6 are
  /// rounded to 6. Not finite if the largest element is not.
  static PISSA_INLINE constexpr float scale(float largest, float) {
    const std::uint32_t bits = bits_of(largest);
    if (bits >= 0x7f800000u) return largest;
    const std::uint32_t exponent = (bits + 0x00200000u) >> 23;
    return exponent > 2 ? float_of((exponent - 2) << 23) : 0x1p-127f;
  }
  static PISSA_INLINE constexpr std::uint8_t code(float scaled) { return e2m1_code(scaled); }
};

template <>
struct FourBits<Format::nvfp4> {
  static constexpr auto& kLevels = kE2m1Levels;
  static constexpr bool kLowFirst = true;
  /// A sixth of the largest element, times `global`, rounded to E4M3, which is stored. Not finite if the element is
  /// not.
  static PISSA_INLINE constexpr float scale(float largest, float global) {
    if (bits_of(largest) >= 0x7f800000u) return largest;
    return e4m3_value(e4m3_code(global * (largest / 6.0f))) / global;
  }
  static PISSA_INLINE constexpr std::uint8_t code(float scaled) { return e2m1_code(scaled); }
};

template <>
struct FourBits<Format::int4> {
  static constexpr float kLevels[16] = {-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f,
                                        0.0f,  1.0f,  2.0f,  3.0f,  4.0f,  5.0f,  6.0f,  7.0f};
  static constexpr bool kLowFirst = true;
  /// The largest element / 7.5, rounded to bf16. Not finite if the element is not.
  static PISSA_INLINE constexpr float scale(float largest, float) {
    const float exact = largest / 7.5f;
    const std::uint32_t bits = bits_of(exact);
    if (bits >= 0x7f800000u) return largest;
    return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
  }
  /// To nearest, ties to even, from -8 to 7.
  static PISSA_INLINE constexpr std::uint8_t code(float scaled) {
    const float clamped = scaled > -8.0f ? (scaled < 7.0f ? scaled : 7.0f) : -8.0f;
    constexpr float kRound = 12582912.0f;  // 3 * 2^22: adding and subtracting it rounds to an integer
    return static_cast<std::uint8_t>(static_cast<std::int32_t>(clamped + kRound - kRound) + 8);
  }
};

}  // namespace pissa
