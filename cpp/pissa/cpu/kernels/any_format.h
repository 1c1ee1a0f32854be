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

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
