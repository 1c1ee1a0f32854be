// INT8, bitsandbytes' 8-bit layout of a weight (LLM.int8(), Dettmers et al., arXiv 2208.07339), byte for byte.
//
// A row of a weight [out, in] is a block. Its scale, called SCB there, is its largest absolute value. A code, called CB
// there, is a signed byte: element * (1 / scale * 127), with every operation rounded to f32, then to an integer, ties
// to even; it is 0 in the whole row if that factor is not finite. The element of a code is code * scale * (1 / 127):
// two products, each rounded to f32.
//
// This header defines the format: factors and the order of the products. Backends vectorise it.
#pragma once

#include "pissa/core/format.h"

namespace pissa {

inline constexpr float kInt8Largest = 127.0f;

/// 1 / 127, bitsandbytes' constant.
inline constexpr float kInt8Step = 7.874015718698502e-3f;

/// The factor by which the elements of a row are multiplied, given their largest absolute value.
PISSA_INLINE constexpr float int8_factor(float largest) {
  const float factor = 1.0f / largest * kInt8Largest;
  return factor <= 0x1.fffffep127f ? factor : 0.0f;  // a row of zeros, or so small that it overflows
}

/// The element of a code, which may be given as a float.
PISSA_INLINE constexpr float int8_element(float code, float scale) { return code * scale * kInt8Step; }

}  // namespace pissa
