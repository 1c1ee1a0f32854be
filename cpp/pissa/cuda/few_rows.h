// Products with few rows, as decoding has them, alone or in batches: bound by reading the second factor once, so
// without a copy of it and with everything that is added in the same kernel.
#pragma once

#include <cstdint>
#include <span>

#include "pissa/core/grouped_linear.h"
#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

inline constexpr std::int64_t kFewRows = 16;  ///< of few_rows_gemm
/// Of few_rows_quantized, each block of which reads all of x from L2. By arithmetic for an H100 (bench/NOTES.md),
/// decoding the weight into memory takes no longer from 128 rows on.
inline constexpr std::int64_t kFewRowsQuantized = 64;
/// Of each layer of few_rows_group, in tiles of kFewRowsQuantized: a launch for each layer costs more.
inline constexpr std::int64_t kFewRowsOfGroup = 128;

/// Whether few_rows_gemm can compute a sum: few rows, dense first factors as they are, second factors transposed.
bool few_rows_fit(std::span<const Term> terms, const MutableMatrix& out);

/// out = addend + bias + sum of scale * a * b^T, with f32 sums and one rounding. Operands are rounded as each term's
/// precision says. At most kMostTerms terms.
void few_rows_gemm(const Context& context, std::span<const Term> terms, const Matrix& addend, const Matrix& bias,
                   const MutableMatrix& out);

/// Whether few_rows_quantized is to compute x W^T: at most kFewRowsQuantized rows of x, in half precision, at 16-byte
/// addresses, W quantised with scales beside its codes, its rows whole lines, and its blocks, unless all of the format
/// divide one, the tail rounded to x's format.
bool few_rows_quantized_fits(const Matrix& x, const Matrix& weight, std::span<const Term> tail);

/// y = x W^T + tail + bias, in one kernel: W is decoded in registers, to x's format, and the tail's factors are rounded
/// to it, for the tensor cores.
void few_rows_quantized(const Context& context, const Matrix& x, const Matrix& weight, std::span<const Term> tail,
                        const Matrix& bias, const MutableMatrix& y);

/// Whether few_rows_group can compute the forward of a group of equal layers: at most kFewRowsOfGroup rows of each, and
/// what few_rows_quantized_fits asks of x and weights.
bool few_rows_group_fits(const Matrix& x, std::span<const GroupedLayer> layers);

/// y and xa of all layers, as grouped_linear_forward says, by two kernels for up to 128 layers that have rows: x A^T,
/// and all the rest.
void few_rows_group(const Context& context, const Matrix& x, std::span<const GroupedLayer> layers,
                    const MutableMatrix& y, const MutableMatrix& xa);

}  // namespace pissa::cuda
