// Quantised matrices on the device: decoding, quantisation, nested scales.
#pragma once

#include <cstdint>

#include "pissa/core/quantized.h"
#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// out [rows, cols] = the same rows and columns of the quantised weight, starting at (row, col).
void decode_codes(const Context& context, const Matrix& weight, std::int64_t row, std::int64_t col,
                  const MutableMatrix& out);

/// out[i, :] = the quantised weight's row rows[i]; its first for one that it does not have.
void decode_rows(const Context& context, const Matrix& weight, const std::int64_t* rows, const MutableMatrix& out);

/// Elements [first, first + count) of the flattened `values` (+ `change`, f32, where given), quantised: `first` is the
/// start of a block and of a byte; `out` is for all of the matrix; `change` begins with the row of element `first`.
void quantize(const Context& context, const Matrix& values, const Matrix& change, std::int64_t first,
              std::int64_t count, const QuantOutput& out);

/// Codes of columns [first, first + errors.cols) of w by error feedback: Backend::quantize_columns.
void quantize_columns(const Context& context, const Matrix& w, const Matrix& lower, Format format, const Scales& scales,
                      std::int64_t first, const MutableMatrix& errors, std::uint8_t* codes);

/// Nested quantisation of absmax, less an offset: codes8 [count], nested_absmax [ceil(count / 256)]. *offset receives
/// *given; or, where `given` is null, the mean, added up in f64 in an order of its own, by a launch more.
void quantize_absmax(const Context& context, const float* absmax, std::int64_t count, const float* given,
                     std::uint8_t* codes8, float* nested_absmax, float* offset);

}  // namespace pissa::cuda
