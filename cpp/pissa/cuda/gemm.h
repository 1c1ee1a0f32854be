// Matrix products by cublasLt, and by cuBLAS where cublasLt knows no way: one product of dense matrices, or of stacks
// of them, in f32, TF32 or f64.
#pragma once

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// out = alpha op(a) op(b) + beta * out + bias for row-major matrices. a and b in one format, out in that or in f32.
/// bias: [1, n], or absent, and given only where takes_bias says so, be it for other columns. Every element is rounded
/// once, from f32; a second time where cublasLt knows no way after all: then the bias is added to `out` first.
struct Matmul {
  Matrix a;
  Op op_a = Op::n;
  Matrix b;
  Op op_b = Op::n;
  float alpha = 1.0f;
  bool accumulate = false;    // beta = 1
  bool may_use_tf32 = false;  // for factors in f32, where the user of context.blas allows it
  Matrix bias = {};
  MutableMatrix out = {};
  std::int64_t count = 1;  // matrices in each stack
};
void matmul(const Context& context, const Matmul& problem);

/// Whether matmul can add `bias` to a problem: it has out's format, is at 16 bytes, as the kernels read it, and
/// cublasLt has a way to do both.
bool takes_bias(const Context& context, Matmul problem, const Matrix& bias);

/// A row-major matrix in f64.
struct WideMatrix {
  double* data;
  std::int64_t rows, cols, ld, stride;
};

/// out = alpha op(a) op(b) + beta out in f64; out overlaps neither.
void matmul(const Context& context, double alpha, const WideMatrix& a, Op op_a, const WideMatrix& b, Op op_b,
            double beta, const WideMatrix& out, std::int64_t count);

/// gram [count][k, k] += rows others^T, a symmetric product, in f64; both [count][k, cols], contiguous. `first`: the
/// sum starts here.
void gram(const Context& context, const double* rows, const double* others, std::int64_t k, std::int64_t cols,
          bool first, double* gram, std::int64_t count);

}  // namespace pissa::cuda
