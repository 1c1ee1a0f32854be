// Products with few rows, as decoding has them, alone or in batches: bound by reading the second factor once, so
// without a copy of it and with everything that is added in the same kernel.
#pragma once

#include <cstdint>
#include <span>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

inline constexpr std::int64_t kFewRows = 16;  ///< of few_rows_gemm
/// Of few_rows_quantized. By arithmetic for an H100 (bench/NOTES.md) more take less time with the weight decoded into
/// memory: each block of 16 columns reads all of x from L2.
inline constexpr std::int64_t kFewRowsQuantized = 64;

/// Whether few_rows_gemm can compute a sum: few rows, dense first factors as they are, second factors transposed.
bool few_rows_fit(std::span<const Term> terms, const MutableMatrix& out);

/// out = addend + bias + sum of scale * a * b^T, with f32 sums and one rounding. Operands are rounded as each term's
/// precision says. At most kMostTerms terms.
void few_rows_gemm(const Context& context, std::span<const Term> terms, const Matrix& addend, const Matrix& bias,
                   const MutableMatrix& out);

/// Whether few_rows_quantized is to compute x W^T: at most kFewRowsQuantized rows of x, in half precision, at 16-byte
/// addresses, W quantised, its rows whole lines, and its blocks, unless all of the format divide one, the tail rounded
/// to x's format.
bool few_rows_quantized_fits(const Matrix& x, const Matrix& weight, std::span<const Term> tail);

/// y = x W^T + tail + bias, in one kernel: W is decoded in registers, to x's format, and the tail's factors are rounded
/// to it, for the tensor cores.
void few_rows_quantized(const Context& context, const Matrix& x, const Matrix& weight, std::span<const Term> tail,
                        const Matrix& bias, const MutableMatrix& y);

}  // namespace pissa::cuda
