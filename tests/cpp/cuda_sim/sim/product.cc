#include "sim/product.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "sim/library.h"

namespace cuda_sim::detail {
namespace {

std::size_t size_of(cudaDataType_t type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

float in_tf32(float value) { return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & ~0x1fffu); }

/// Elements of one type, as the sums see them.
template <class Sum>
class Elements {
 public:
  Elements(cudaDataType_t type, bool flushes, bool tf32 = false) : type_(type), flushes_(flushes), tf32_(tf32) {}

  Sum load(const void* from, std::size_t index) const {
    if constexpr (std::is_same_v<Sum, double>) return static_cast<const double*>(from)[index];
    if (type_ == CUDA_R_16BF) return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[index]);
    if (type_ == CUDA_R_16F) return __half2float(static_cast<const __half*>(from)[index]);
    const float value = flushed(static_cast<const float*>(from)[index]);
    return tf32_ ? in_tf32(value) : value;
  }

  void store(void* to, std::size_t index, Sum value) const {
    if constexpr (std::is_same_v<Sum, double>) {
      static_cast<double*>(to)[index] = value;
    } else if (type_ == CUDA_R_16BF) {
      static_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(value);
    } else if (type_ == CUDA_R_16F) {
      static_cast<__half*>(to)[index] = __float2half_rn(value);
    } else {
      static_cast<float*>(to)[index] = flushed(value);
    }
  }

  Sum rounded(Sum value) const {
    Sum stored;
    store(&stored, 0, value);
    return load(&stored, 0);
  }

  /// An f32, whatever the type.
  Sum flushed(Sum value) const {
    return flushes_ && std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(Sum{0}, value) : value;
  }

 private:
  cudaDataType_t type_;
  bool flushes_;
  bool tf32_;
};

/// A matrix of the batch, all of it allocated.
void* matrix(const Stack& stack, int index, const std::string& what) {
  const auto element = static_cast<std::int64_t>(size_of(stack.type));
  char* start = static_cast<char*>(stack.data) + index * stack.stride * element;
  require_allocated(start, extent(stack.rows, stack.cols, static_cast<std::size_t>(stack.ld), element), what.c_str());
  return start;
}

/// op(matrix), its columns one after the other.
template <class Sum>
std::vector<Sum> decoded(const void* from, const Stack& stack, cublasOperation_t op, const Elements<Sum>& elements) {
  std::vector<Sum> result(stack.rows * stack.cols);
  for (std::uint64_t j = 0; j < stack.cols; ++j) {
    for (std::uint64_t i = 0; i < stack.rows; ++i) {
      result[op == CUBLAS_OP_N ? j * stack.rows + i : i * stack.cols + j] =
          elements.load(from, j * static_cast<std::uint64_t>(stack.ld) + i);
    }
  }
  return result;
}

template <class Sum>
void multiply(const Product& product, int index) {
  const std::string call = product.call;
  const std::uint64_t m = product.d.rows, n = product.d.cols, k = product.inner();
  const Elements<Sum> in(product.a.type, product.flushes, product.tf32), out(product.d.type, product.flushes);
  const auto a = decoded(matrix(product.a, index, call + ": A"), product.a, product.op_a, in);
  const auto b = decoded(matrix(product.b, index, call + ": B"), product.b, product.op_b, in);
  const void* c = product.beta == 0 ? nullptr : matrix(product.c, index, call + ": C");
  void* d = matrix(product.d, index, call + ": D");
  std::vector<Sum> sums(m), bias(m);
  if (product.bias) {
    require_allocated(product.bias, m * size_of(product.d.type), (call + ": bias").c_str());
    require_aligned(product.bias, 16, (call + ": bias").c_str());
    for (std::uint64_t i = 0; i < m; ++i) bias[i] = out.load(product.bias, i);
  }
  const auto alpha = static_cast<Sum>(product.alpha), beta = static_cast<Sum>(product.beta);
  for (std::uint64_t j = 0; j < n; ++j) {
    std::fill(sums.begin(), sums.end(), Sum{0});
    for (std::uint64_t p = 0; p < k; ++p) {
      if (product.rounds_parts && p == (k + 1) / 2) {
        for (Sum& sum : sums) sum = out.rounded(sum);
      }
      const Sum factor = b[j * k + p];
      const Sum* column = a.data() + p * m;
      Sum* to = sums.data();
      for (std::uint64_t i = 0; i < m; ++i) to[i] += factor * column[i];
    }
    for (std::uint64_t i = 0; i < m; ++i) {
      Sum value = alpha * in.flushed(sums[i]);
      if (c) value += beta * out.load(c, j * static_cast<std::uint64_t>(product.c.ld) + i);
      if (product.bias && product.rounds_before_bias) value = out.rounded(value);
      if (product.bias) value += bias[i];
      out.store(d, j * static_cast<std::uint64_t>(product.d.ld) + i, value);
    }
  }
}

Type type_of(cudaDataType_t type) {
  switch (type) {
    case CUDA_R_64F:
      return Type::f64;
    case CUDA_R_32F:
      return Type::f32;
    case CUDA_R_16BF:
      return Type::bf16;
    default:
      return Type::f16;
  }
}

}  // namespace

bool types_supported(cublasComputeType_t compute, cudaDataType_t scale, cudaDataType_t a, cudaDataType_t b,
                     cudaDataType_t c, cudaDataType_t d) {
  const bool f64 = compute == CUBLAS_COMPUTE_64F && scale == CUDA_R_64F;
  const bool tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32 && scale == CUDA_R_32F;
  const bool f32 = compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F;
  if (a != b || c != d) return false;
  switch (a) {
    case CUDA_R_64F:
      return f64 && d == CUDA_R_64F;
    case CUDA_R_32F:
      return (f32 || tf32) && d == CUDA_R_32F;
    case CUDA_R_16BF:
    case CUDA_R_16F:
      return f32 && (d == a || d == CUDA_R_32F);
    default:
      return false;
  }
}

double load_scalar(cudaDataType_t type, const void* from) {
  return type == CUDA_R_64F ? *static_cast<const double*>(from) : *static_cast<const float*>(from);
}

void Product::run() const {
  for (int i = 0; i < batch; ++i) d.type == CUDA_R_64F ? multiply<double>(*this, i) : multiply<float>(*this, i);
}

void record_product(const Product& product) {
  const auto m = static_cast<std::int64_t>(product.d.rows), n = static_cast<std::int64_t>(product.d.cols),
             k = static_cast<std::int64_t>(product.inner());
  record({.kind = Kind::library,
          .name = product.call,
          .type = type_of(product.a.type),
          .m = m,
          .n = n,
          .k = k,
          .batch = product.batch,
          .flops = product.batch * gemm_flops(static_cast<double>(m), static_cast<double>(n), static_cast<double>(k))});
}

}  // namespace cuda_sim::detail
