// NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314), in bitsandbytes' layout, byte for byte.
//
// A weight [out, in] is flattened and cut into blocks of `blocksize` elements, so a block may cross rows, and the last
// one may be short. Each block has a scale, its largest absolute value `absmax`. An element is stored as the index of
// the level nearest to element / absmax. Two codes share a byte, with the first element in the high nibble. An odd
// number of elements ends with the code of zero.
//
// This header defines the format: levels, thresholds, and the rounding of one element. Backends vectorise it.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

/// The divisor of the elements of a block, given their largest absolute value. NaN stays NaN.
PISSA_INLINE constexpr float nf4_divisor(float largest) {
  return largest < kSmallestAbsmax ? kSmallestAbsmax : largest;
}

/// The 16 levels, ascending.
inline constexpr float kNf4Levels[16] = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};

/// Thresholds between neighbouring levels: an element above threshold i has a code above i.
struct Nf4Thresholds {
  float value[15];
};
inline constexpr Nf4Thresholds kNf4Thresholds = [] {
  Nf4Thresholds thresholds{};
  for (int i = 0; i < 15; ++i) thresholds.value[i] = (kNf4Levels[i] + kNf4Levels[i + 1]) / 2;
  return thresholds;
}();

/// Code of an element already divided by its block's absmax: the number of thresholds below it.
PISSA_INLINE constexpr std::uint8_t nf4_code(float scaled) {
  std::uint8_t code = 0;
  for (int i = 0; i < 15; ++i) code += scaled > kNf4Thresholds.value[i];
  return code;
}

/// A short search for NF4 codes: 32 cells over [-1, 1], each with at most one threshold inside. A value's cell gives
/// the number of thresholds below the cell, and the one to compare it with. Rounding may move a value near a cell's
/// edge into the next cell, but no threshold is so close to an edge that this matters.
struct Nf4Search {
  static constexpr float kFactor = 15.9f;  // cell = trunc(kFactor * value + kShift): 0.05 at -1, 31.85 at 1
  static constexpr float kShift = 15.95f;
  float threshold[32];
  std::int32_t base[32];
};
inline constexpr Nf4Search kNf4Search = [] {
  Nf4Search search{};
  for (int cell = 0; cell < 32; ++cell) {
    search.threshold[cell] = 2.0f;  // none
    for (const float threshold : kNf4Thresholds.value) {
      const float place = Nf4Search::kFactor * threshold + Nf4Search::kShift;
      search.base[cell] += place < static_cast<float>(cell);
      if (static_cast<int>(place) == cell) search.threshold[cell] = threshold;
    }
  }
  return search;
}();

}  // namespace pissa
