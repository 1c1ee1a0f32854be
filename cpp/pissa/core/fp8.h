// FP8: E4M3 ("fn": no infinities, the largest is 448), a byte an element, multiplied by its block's scale (which files
// often call weight_scale_inv). A matrix that is quantised here has a scale for each row, its largest absolute value /
// 448. One that was quantised elsewhere may have tiles of 128 x 128 (DeepSeek-V3) or 1 x 32 (MXFP8).
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

/// A scale in E8M0: 2^(byte - 127), where 255 is NaN.
PISSA_INLINE constexpr float e8m0_value(std::uint8_t byte) {
  return float_of(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : std::uint32_t{byte} << 23);
}

inline constexpr float kE4m3Largest = 448.0f;

/// The value of a byte; NaN for 0x7f and 0xff.
PISSA_INLINE constexpr float e4m3_value(std::uint8_t code) {
  const std::uint32_t magnitude = code & 0x7fu;
  // Exponent and fraction as in a float, times the ratio of the exponents' biases, 2^(127 - 7); also for subnormals.
  const float size = magnitude == 0x7fu ? float_of(0x7fc00000u)
                     : magnitude < 8u   ? static_cast<float>(magnitude) * 0x1p-9f
                                        : float_of((magnitude << 20) + (120u << 23));
  return code & 0x80u ? -size : size;
}

/// To nearest, ties to even; values beyond 448 give 448. For NaN the code is arbitrary.
PISSA_INLINE constexpr std::uint8_t e4m3_code(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = bits >> 31 << 7;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x43e00000u) return static_cast<std::uint8_t>(sign | 0x7eu);  // from 448 on
  if (magnitude < 0x3c800000u) {  // below 2^-6, steps of 2^-9: adding 2^14, whose last bit is 2^-9, rounds
    const float sum = float_of(magnitude) + 16384.0f;
    return static_cast<std::uint8_t>(sign | (bits_of(sum) - 0x46800000u));
  }
  const std::uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  return static_cast<std::uint8_t>(sign | ((rounded - (120u << 23)) >> 20));
}

/// The scale of a row, by which its elements are divided.
PISSA_INLINE constexpr float e4m3_scale(float largest) { return largest / kE4m3Largest; }

}  // namespace pissa
