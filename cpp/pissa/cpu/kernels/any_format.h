// The numbers of a matrix in any format, for the header of a format, which multiplies its codes by them. decode.h
// contains the definitions. Included only by kernels.cc.
#pragma once

#include "pissa/cpu/kernels/dense.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Elements [col, col + count) of a row times scale, as elements of the product.
PISSA_INLINE void decode_elements(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                  float scale, F32, float* to);
#if PISSA_HAS_BF16
PISSA_INLINE void decode_elements(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                  float scale, Bf16, Half* to);
#endif

// The lowest and the highest of 16 levels.
struct Ends {
  float lowest, highest;
};
constexpr Ends ends_of(const float* levels) {
  Ends ends{levels[0], levels[0]};
  for (int i = 1; i < 16; ++i) {
    if (levels[i] < ends.lowest) ends.lowest = levels[i];
    if (levels[i] > ends.highest) ends.highest = levels[i];
  }
  return ends;
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
