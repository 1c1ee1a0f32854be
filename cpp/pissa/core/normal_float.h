// NF3 and NF2, NormalFloats of 3 and 2 bits: NF4's construction (QLoRA, arXiv 2305.14314, section 3) with fewer levels,
// in a layout of our own. No other program reads it.
//
// Blocks and scales are those of NF4 (nf4.h). For `bits` bits, the 2^bits levels are quantiles of the normal
// distribution: half of them above zero, zero, and one fewer below, divided by the largest. With p = 1 - (1 / (2^bits -
// 1) + 1 / 2^bits) / 4, their probabilities are evenly spaced from 1/2 to p. Codes are packed in order, starting at the
// lowest bit of the first byte: eight of them take `bits` bytes, so a block takes whole bytes. The last byte ends with
// codes of zero.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

template <Format format>
struct NormalFloat;

template <>
struct NormalFloat<Format::nf3> {
  static constexpr float kLevels[8] = {-1.0f,       -0.535022709f, -0.246931432f, 0.0f,
                                       0.18333748f, 0.381993954f,  0.622985742f,  1.0f};
};
template <>
struct NormalFloat<Format::nf2> {
  static constexpr float kLevels[4] = {-1.0f, 0.0f, 0.435818165f, 1.0f};
};

/// Code of an element already divided by its block's absmax: the number of thresholds below it. Each threshold is in
/// the middle of two levels.
template <Format format>
PISSA_INLINE constexpr std::uint8_t normal_float_code(float scaled) {
  constexpr auto& levels = NormalFloat<format>::kLevels;
  std::uint8_t code = 0;
  for (int i = 0; i + 1 < 1 << info(format).bits; ++i) code += scaled > (levels[i] + levels[i + 1]) / 2;
  return code;
}

}  // namespace pissa
