// NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314), in bitsandbytes' layout, byte for byte.
//
// A weight [out, in] is flattened and cut into blocks of `blocksize` elements, so a block may cross rows; the last one
// may be short. Each block has a scale, its largest absolute value `absmax`; an element is the index of the level
// nearest to element / absmax. Two codes share a byte, the first element in the high nibble; an odd number of elements
// ends with the code of zero. With nested ("double") quantisation the scales, less their mean, are themselves stored
// in 8 bits, in blocks of 256, on the dynamic map of bitsandbytes (Dettmers et al., arXiv 2110.02861).
//
// This header fixes the format: levels, thresholds, rounding of one element. Backends vectorise it.
#pragma once

#include <cstdint>

#include "pissa/core/error.h"
#include "pissa/core/types.h"

namespace pissa {

inline constexpr std::int64_t kNestedBlocksize = 256;

/// Divisors are never below this, so that an all-zero block needs no special case (a denormal: bitsandbytes' value).
inline constexpr float kSmallestAbsmax = 1e-38f;

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

/// The signed 8-bit dynamic map, ascending; levels of a nested scale relative to its block's absmax.
inline constexpr float kDynamicMap[256] = {
    -0.992968738f,    -0.978906274f,    -0.96484375f,     -0.950781226f,
    -0.936718762f,    -0.922656238f,    -0.908593774f,    -0.89453125f,
    -0.880468726f,    -0.866406262f,    -0.852343738f,    -0.838281274f,
    -0.82421875f,     -0.810156226f,    -0.796093762f,    -0.782031238f,
    -0.767968774f,    -0.75390625f,     -0.739843726f,    -0.725781262f,
    -0.711718798f,    -0.697656274f,    -0.68359375f,     -0.669531226f,
    -0.655468762f,    -0.641406298f,    -0.627343774f,    -0.61328125f,
    -0.599218726f,    -0.585156262f,    -0.571093798f,    -0.557031274f,
    -0.54296875f,     -0.528906226f,    -0.514843702f,    -0.500781238f,
    -0.486718714f,    -0.47265625f,     -0.458593726f,    -0.444531262f,
    -0.430468738f,    -0.416406244f,    -0.40234375f,     -0.388281226f,
    -0.374218762f,    -0.360156238f,    -0.346093744f,    -0.33203125f,
    -0.317968726f,    -0.303906262f,    -0.289843738f,    -0.275781274f,
    -0.26171875f,     -0.247656241f,    -0.233593747f,    -0.219531253f,
    -0.205468744f,    -0.19140625f,     -0.177343756f,    -0.163281247f,
    -0.149218753f,    -0.135156244f,    -0.12109375f,     -0.107031256f,
    -0.0985937491f,   -0.0957812592f,   -0.0929687545f,   -0.0901562497f,
    -0.0873437524f,   -0.0845312476f,   -0.0817187577f,   -0.078906253f,
    -0.0760937482f,   -0.0732812509f,   -0.0704687461f,   -0.0676562563f,
    -0.0648437515f,   -0.0620312504f,   -0.0592187531f,   -0.0564062484f,
    -0.053593751f,    -0.05078125f,     -0.047968749f,    -0.0451562516f,
    -0.0423437469f,   -0.0395312496f,   -0.0367187522f,   -0.0339062512f,
    -0.0310937501f,   -0.028281251f,    -0.0254687499f,   -0.0226562507f,
    -0.0198437516f,   -0.0170312505f,   -0.0142187504f,   -0.0114062503f,
    -0.00971874967f,  -0.00915624946f,  -0.00859375019f,  -0.00803124998f,
    -0.00746874977f,  -0.00690625003f,  -0.00634374982f,  -0.00578125007f,
    -0.00521875033f,  -0.00465624966f,  -0.00409374991f,  -0.00353124971f,
    -0.00296874996f,  -0.00240624999f,  -0.00184375001f,  -0.00128124992f,
    -0.000943750085f, -0.000831249985f, -0.00071875006f,  -0.000606250076f,
    -0.000493750034f, -0.000381250022f, -0.000268750038f, -0.000156250011f,
    -8.87499991e-05f, -6.62500024e-05f, -4.37499984e-05f, -2.12499981e-05f,
    -7.7499999e-06f,  -3.25000019e-06f, -5.50000038e-07f, 0.0f,
    5.50000038e-07f,  3.25000019e-06f,  7.7499999e-06f,   2.12499981e-05f,
    4.37499984e-05f,  6.62500024e-05f,  8.87499991e-05f,  0.000156250011f,
    0.000268750038f,  0.000381250022f,  0.000493750034f,  0.000606250076f,
    0.00071875006f,   0.000831249985f,  0.000943750085f,  0.00128124992f,
    0.00184375001f,   0.00240624999f,   0.00296874996f,   0.00353124971f,
    0.00409374991f,   0.00465624966f,   0.00521875033f,   0.00578125007f,
    0.00634374982f,   0.00690625003f,   0.00746874977f,   0.00803124998f,
    0.00859375019f,   0.00915624946f,   0.00971874967f,   0.0114062503f,
    0.0142187504f,    0.0170312505f,    0.0198437516f,    0.0226562507f,
    0.0254687499f,    0.028281251f,     0.0310937501f,    0.0339062512f,
    0.0367187522f,    0.0395312496f,    0.0423437469f,    0.0451562516f,
    0.047968749f,     0.05078125f,      0.053593751f,     0.0564062484f,
    0.0592187531f,    0.0620312504f,    0.0648437515f,    0.0676562563f,
    0.0704687461f,    0.0732812509f,    0.0760937482f,    0.078906253f,
    0.0817187577f,    0.0845312476f,    0.0873437524f,    0.0901562497f,
    0.0929687545f,    0.0957812592f,    0.0985937491f,    0.107031256f,
    0.12109375f,      0.135156244f,     0.149218753f,     0.163281247f,
    0.177343756f,     0.19140625f,      0.205468744f,     0.219531253f,
    0.233593747f,     0.247656241f,     0.26171875f,      0.275781274f,
    0.289843738f,     0.303906262f,     0.317968726f,     0.33203125f,
    0.346093744f,     0.360156238f,     0.374218762f,     0.388281226f,
    0.40234375f,      0.416406244f,     0.430468738f,     0.444531262f,
    0.458593726f,     0.47265625f,      0.486718714f,     0.500781238f,
    0.514843702f,     0.528906226f,     0.54296875f,      0.557031274f,
    0.571093798f,     0.585156262f,     0.599218726f,     0.61328125f,
    0.627343774f,     0.641406298f,     0.655468762f,     0.669531226f,
    0.68359375f,      0.697656274f,     0.711718798f,     0.725781262f,
    0.739843726f,     0.75390625f,      0.767968774f,     0.782031238f,
    0.796093762f,     0.810156226f,     0.82421875f,      0.838281274f,
    0.852343738f,     0.866406262f,     0.880468726f,     0.89453125f,
    0.908593774f,     0.922656238f,     0.936718762f,     0.950781226f,
    0.96484375f,      0.978906274f,     0.992968738f,     1.0f,
};

PISSA_INLINE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Bytes of codes for `count` elements.
constexpr std::int64_t nf4_bytes(std::int64_t count) { return ceil_div(count, 2); }

/// Whether bitsandbytes knows this block size: a power of two, 32 to 4096.
constexpr bool is_nf4_blocksize(std::int64_t blocksize) {
  return blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0;
}

/// Code of an element already divided by its block's absmax: the number of thresholds below it.
PISSA_INLINE constexpr std::uint8_t nf4_code(float scaled) {
  std::uint8_t code = 0;
  for (int i = 0; i < 15; ++i) code += scaled > kNf4Thresholds.value[i];
  return code;
}

/// A short search for NF4 codes: 32 cells over [-1, 1], none with more than one threshold inside. A value's cell tells
/// how many thresholds are below the cell, and which one to compare it with. Rounding may put a value next to a cell's
/// edge into its neighbour; no threshold is so near an edge that this matters.
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

/// bitsandbytes rounds a scale (less the offset), divided by its block's absmax, to a grid of 2^16 points over [-1, 1]
/// ... (NaN, where scales overflow, is as good as any other point, but must be one)
constexpr std::int32_t dynamic_point(float scaled) {
  return scaled >= -1.0f ? static_cast<std::int32_t>((scaled + 1.0f) * 32767.5f + 0.5f) : 0;
}

/// ... and takes the level of the 8-bit map nearest to that point; equal distances go to the lower level.
constexpr std::uint8_t dynamic_code(std::int32_t point) {
  const float grid = static_cast<float>(point) / 32767.5f - 1.0f;
  std::uint8_t low = 0;
  std::uint8_t high = 255;
  while (low < high) {  // first level whose upper threshold is not below the point
    const std::uint8_t middle = static_cast<std::uint8_t>((low + high) / 2);
    if (grid > (kDynamicMap[middle] + kDynamicMap[middle + 1]) / 2) low = static_cast<std::uint8_t>(middle + 1);
    else high = middle;
  }
  return low;
}

/// Throws unless `weight` is a complete NF4 matrix: pointers present, block size known.
inline void check_nf4(const Matrix& weight) {
  const Nf4Scales& scales = weight.scales;
  PISSA_CHECK(is_nf4_blocksize(scales.blocksize), "blocksize: got ", scales.blocksize,
              "; allowed: a power of two from 32 to 4096");
  PISSA_CHECK(scales.absmax || (scales.absmax8 && scales.nested_absmax && scales.offset),
              "NF4 matrix without scales: give absmax, or absmax8 with nested_absmax and offset");
}

}  // namespace pissa
