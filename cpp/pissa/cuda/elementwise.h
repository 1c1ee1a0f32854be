// Kernels over the elements of matrices, or of stacks of `count` matrices: conversion, sums, scaling, the sketch.
#pragma once

#include <cstdint>
#include <span>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// out = scale * a, both dense. With a.ld = 0 the first row of a is every row.
void convert(const Context& context, const Matrix& a, float scale, const MutableMatrix& out, std::int64_t count = 1);

/// out = a + b in f32, of one sum or two; out may be a. With ld = 0 as above.
void add(const Context& context, const Sum& first, const Sum& second, std::int64_t count);

/// Differences of dense matrices, and the sum of the squares of them all: of what the outputs hold, in f64, in an order
/// of its own.
class Differences {
 public:
  explicit Differences(const Context& context);

  /// out = a - b, computed in f32.
  void subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out);
  void sum(double* squares) const;

 private:
  const Context& context_;
  Array<double> sums_;  // one for each block of threads
};

/// out[i, j] = scale * sign (i * cols + j) of philox.h; f32. The same for every matrix of the stack.
void fill_signs(const Context& context, const MutableMatrix& out, std::uint64_t seed, float scale, std::int64_t count);

/// out[i, :] or out[:, i] = sqrt(s[i] / divisor) * a[i, :]; f32.
void scale_rows(const Context& context, const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out,
                Op op, std::int64_t count);

/// out[i, :] = a[i, :] times the power of two that brings its largest |element| into [1, 2); a: f32.
void normalize_rows(const Context& context, const Matrix& a, const MutableMatrix& out, std::int64_t count);

/// largest[i] = max(largest[i], largest |element| of matrix i), NaN above infinity; leaves out what is quantised.
void raise_max_abs(const Context& context, std::span<const Matrix> matrices, float* largest);

/// wide [rows, cols], contiguous, of each matrix = a in f64; and back.
void widen(const Context& context, const Matrix& a, double* wide, std::int64_t count);
void narrow(const Context& context, const double* wide, const MutableMatrix& out, std::int64_t count);

}  // namespace pissa::cuda
