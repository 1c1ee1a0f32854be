// Sums of products on the device: which type to multiply in, what to convert for it, in what order to add.
#pragma once

#include <cstdint>
#include <span>

#include "pissa/core/backend.h"
#include "pissa/core/grouped_linear.h"
#include "pissa/core/types.h"
#include "pissa/cuda/context.h"
#include "pissa/cuda/weight.h"

namespace pissa::cuda {

/// The type in which two matrices are multiplied. Halves of one kind have exact products in f32.
Format common_format(const Matrix& a, const Matrix& b, Precision precision);

/// out = a, from any format.
void convert_any(const Context& context, const Matrix& a, const MutableMatrix& out, std::int64_t count = 1);

/// out = addend + sum of the terms, for each of `count` matrices.
void sum_of_products(const Context& context, std::span<const Term> terms, const Matrix& addend,
                     const MutableMatrix& out, std::int64_t count = 1);

/// y = scale * x op(weight) + tail + bias: a weight that has to be converted first is so in chunks of at most
/// `chunk_bytes`, two at a time.
void weight_product(const Context& context, const Matrix& x, const Weight& weight, Op op, float scale,
                    Precision precision, std::span<const Term> tail, const Matrix& bias, const MutableMatrix& y,
                    std::int64_t chunk_bytes);

/// The forward of a group of layers, as grouped_linear_forward says, where few_rows_group can compute it; false:
/// nothing was computed.
bool grouped_product(const Context& context, const Matrix& x, std::span<const GroupedLayer> layers,
                     const MutableMatrix& y, const MutableMatrix& xa);

/// addend + sum of the terms, quantised, a piece of at most `chunk_bytes` of the sum at a time.
void quantized_sum(const Context& context, std::span<const Term> terms, const Matrix& addend, const QuantOutput& out,
                   std::int64_t chunk_bytes);

}  // namespace pissa::cuda
