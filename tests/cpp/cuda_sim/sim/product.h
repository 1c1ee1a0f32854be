// The product of matrices that cuBLASLt's and cuBLAS's functions are.
#pragma once

#include <cstdint>

#include "cublas_v2.h"

namespace cuda_sim::detail {

/// Column-major matrices in device memory, `ld` elements from column to column and `stride` from matrix to matrix.
struct Stack {
  void* data;
  cudaDataType_t type;
  std::uint64_t rows, cols;
  std::int64_t ld, stride;
};

/// Which types can be multiplied, with alpha and beta of type `scale`.
bool types_supported(cublasComputeType_t compute, cudaDataType_t scale, cudaDataType_t a, cudaDataType_t b,
                     cudaDataType_t c, cudaDataType_t d);

/// A number of alpha's type.
double load_scalar(cudaDataType_t type, const void* from);

/// D = alpha op(A) op(B) + beta C + bias, `batch` times; the bias is a column of D, the same for all.
///
/// Of f64 all is in double. Of all else: the products are added up in f32, one after the other from the first, each
/// rounded before it is added (a device fuses the two); alpha multiplies the sum in f32; beta C and the bias are added
/// in f32; D is rounded once. So what overflows in a sum is lost, whatever alpha would have made of it.
struct Product {
  const char* call;  // in whose name it aborts
  cublasOperation_t op_a, op_b;
  Stack a, b, c, d;
  int batch;
  double alpha, beta;       // where beta is 0, C is not read
  const void* bias;         // null, or of D's type and loaded by 16 bytes
  bool rounds_parts;        // the first half of each sum is rounded to D's type
  bool rounds_before_bias;  // D is rounded before the bias is added, and after it
  bool tf32;                // f32 elements of A and B lose their lowest 13 bits, as in tensor cores
  bool flushes;             // denormal f32: elements that are read or written, and sums before alpha

  std::uint64_t inner() const { return op_a == CUBLAS_OP_N ? a.cols : a.rows; }

  /// To be called as work of the device.
  void run() const;
};

/// In the ledger.
void record_product(const Product& product);

}  // namespace cuda_sim::detail
