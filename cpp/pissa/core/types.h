// Matrices in the core: a pointer, a shape, and how the numbers are stored.
//
// Everything is row-major. `ld` is the leading dimension in elements: the distance between the starts of two rows.
// Nothing in this header dereferences a pointer, because it may point to a device's memory.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa {

/// Scales of a quantised matrix, one per block of `blocksize` elements of the flattened matrix. For NF4 and INT8,
/// a scale is the block's largest absolute value. One of `absmax`, `absmax16` and `absmax8` contains them. A byte
/// of absmax8 means, for block i: with nested_absmax (double quantisation), `kDynamicMap[absmax8[i]] * nested_absmax[i
/// / 256] + *offset`, with the map of bitsandbytes; with `levels`, `levels[absmax8[i]]`; with neither, the power of two
/// of E8M0.
///
/// For FP8 a block is a tile of `rows` rows and `blocksize` columns, smaller at the edges. Tiles are row-major, with
/// `across` of them side by side.
struct Scales {
  std::int64_t blocksize = 0;               ///< for INT8 the columns of the matrix: a block is a row
  const float* absmax = nullptr;            ///< [blocks]
  const std::uint8_t* absmax8 = nullptr;    ///< [blocks]
  const float* nested_absmax = nullptr;     ///< [ceil(blocks / 256)]
  const float* offset = nullptr;            ///< one number
  const std::uint16_t* absmax16 = nullptr;  ///< [blocks], bf16
  const float* levels = nullptr;            ///< [256]
  std::int64_t rows = 1;
  std::int64_t across = 1;
};

/// A read-only matrix [rows, cols], row-major, in any format: a view. A backend that computes on a stack of equal
/// matrices at once takes one Matrix for all of them.
struct Matrix {
  const void* data = nullptr;  ///< elements, or codes; null: absent
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t ld = 0;  ///< elements from a row to the next; ignored for quantised matrices, which are contiguous
  Format format = Format::f32;
  Scales scales = {};       ///< of a quantised format
  std::int64_t stride = 0;  ///< elements between the matrices of a stack; 0: one matrix, the same for the whole stack

  /// False for an optional argument that was not given.
  PISSA_INLINE constexpr explicit operator bool() const { return data != nullptr; }
};

/// A writable matrix [rows, cols] in a dense format: a view. It converts to a Matrix.
struct MutableMatrix {
  void* data = nullptr;  ///< null: absent
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t ld = 0;  ///< elements from a row to the next
  Format format = Format::f32;
  std::int64_t stride = 0;  ///< elements between the matrices of a stack

  /// False for an optional argument that was not given.
  PISSA_INLINE constexpr explicit operator bool() const { return data != nullptr; }
  PISSA_INLINE constexpr operator Matrix() const { return {data, rows, cols, ld, format, {}, stride}; }
};

/// Rows [first, first + count) of a dense matrix.
inline MutableMatrix rows_of(MutableMatrix matrix, std::int64_t first, std::int64_t count) {
  matrix.data = static_cast<char*>(matrix.data) + first * matrix.ld * element_size(matrix.format);
  matrix.rows = count;
  return matrix;
}
/// The same for a read-only matrix.
inline Matrix rows_of(Matrix matrix, std::int64_t first, std::int64_t count) {
  matrix.data = static_cast<const char*>(matrix.data) + first * matrix.ld * element_size(matrix.format);
  matrix.rows = count;
  return matrix;
}

/// Columns [first, first + count) of a dense matrix.
inline MutableMatrix cols_of(MutableMatrix matrix, std::int64_t first, std::int64_t count) {
  matrix.data = static_cast<char*>(matrix.data) + first * element_size(matrix.format);
  matrix.cols = count;
  return matrix;
}
/// The same for a read-only matrix.
inline Matrix cols_of(Matrix matrix, std::int64_t first, std::int64_t count) {
  matrix.data = static_cast<const char*>(matrix.data) + first * element_size(matrix.format);
  matrix.cols = count;
  return matrix;
}

/// Matrix number i of a stack.
inline MutableMatrix one_of(MutableMatrix stack, std::int64_t i) {
  stack.data = static_cast<char*>(stack.data) + i * stack.stride * element_size(stack.format);
  stack.stride = 0;
  return stack;
}
/// The same for a read-only matrix.
inline Matrix one_of(Matrix stack, std::int64_t i) {
  stack.data = static_cast<const char*>(stack.data) + i * stack.stride * element_size(stack.format);
  stack.stride = 0;
  return stack;
}

/// Whether a GEMM reads an operand as it is or transposed (BLAS's N and T).
enum class Op : std::uint8_t { n, t };

/// The activation of a gated linear unit.
enum class Activation { silu, gelu_tanh };

/// The format to which a product's operands may be rounded before they are multiplied. Sums are always f32. `bf16` and
/// `f16` are mixed precision, which a device uses if it has faster units for it. `tf32` is TF32 if the device supports
/// it and its user has allowed it, otherwise f32. `f32` keeps every given digit.
///
/// `f16_scaled` is f16 for a product of which one operand, the first if both are, is f32 and may exceed f16's range,
/// 65,504. That operand is multiplied by kScaledDown before it is rounded: it may be 4 million, and what is below 2^-19
/// is lost. The other operand, or if it is f16 already the product, is multiplied by kScaledUp.
///
/// `int8` is for a product with a weight, of which both operands are rounded to integers of 8 bits (MultipliesBytes).
enum class Precision : std::uint8_t { f32, bf16, f16, f16_scaled, tf32, int8 };

inline constexpr float kScaledDown = 0x1p-6f, kScaledUp = 0x1p6f;

/// The format to which operands are rounded; f32 for those that keep their digits.
PISSA_INLINE constexpr Format format_of(Precision precision) {
  if (precision == Precision::bf16) return Format::bf16;
  return precision == Precision::f16 || precision == Precision::f16_scaled ? Format::f16 : Format::f32;
}

/// Mixed precision in the usual sense: half-precision activations request products in their format, of the factors too.
/// For f32, the user's choice of TF32 applies, as it does for the adapted layer.
PISSA_INLINE constexpr Precision precision_of(Format activations) {
  if (activations == Format::bf16) return Precision::bf16;
  return activations == Format::f16 ? Precision::f16 : Precision::tf32;
}

/// For products with x A^T. PiSSA's A0 has the roots of the singular values in it, so that f16 might not hold it.
PISSA_INLINE constexpr Precision precision_of_xa(Format activations) {
  return activations == Format::f16 ? Precision::f16_scaled : precision_of(activations);
}

/// Whether an algorithm may assume that rows are linearly independent, or must handle any rows.
enum class Rank : std::uint8_t { assumed_full, any };

/// Columns of a weight that error feedback rounds one after the other, between two GEMMs.
inline constexpr std::int64_t kFeedbackColumns = 64;

/// out = a + b, elementwise.
struct Sum {
  Matrix a;
  Matrix b;
  MutableMatrix out;
};

/// One product of a GEMM: scale * op(a) * op(b).
struct Term {
  Matrix a;
  Op op_a = Op::n;
  Matrix b;
  Op op_b = Op::n;
  float scale = 1.0f;
  Precision precision = Precision::f32;

  /// Columns of op(a), which are rows of op(b).
  PISSA_INLINE std::int64_t inner() const { return op_a == Op::n ? a.cols : a.rows; }
};

}  // namespace pissa
