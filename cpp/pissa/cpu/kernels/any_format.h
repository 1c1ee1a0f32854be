// The numbers of a matrix in any format, for the header of a format, which multiplies its codes with them. decode.h has
// the definitions. Included by kernels.cc only.
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
