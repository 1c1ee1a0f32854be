// INT8 codes. Included only by kernels.cc.
#pragma once

#include "pissa/core/int8.h"
#include "pissa/cpu/kernels/any_format.h"
#include "pissa/cpu/kernels/reduce.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

struct Int8 {
  static constexpr Format kFormat = Format::int8;

  static PISSA_INLINE std::int64_t block(const Scales&, std::int64_t row, std::int64_t, std::int64_t) { return row; }
  template <class Product>
  static void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                     typename Product::Element* to);
  template <class Product>
  static void decode_unscaled(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                              typename Product::Element* to);
  static void quantize(const float* values, std::int64_t count, std::int64_t blocksize, float, std::uint8_t* codes,
                       float* scales);
  static PISSA_INLINE float nearest(float value, float scale, std::uint8_t& code);
  static PISSA_INLINE void pack(const std::uint8_t* codes, std::int64_t count, std::uint8_t* to) {
    __builtin_memcpy(to, codes, count);
  }
  template <class Product>
  static bool dots(const Term& term, std::int64_t rows) {
    return rows <= kCodeDotRows && term.op_a == Op::n && term.op_b == Op::t;
  }
  template <class Product>
  static void dot(const Term& term, const Block& block, const Panels& panels, bool accumulate);
};

PISSA_INLINE const std::int8_t* int8_codes(const Matrix& matrix, std::int64_t row, std::int64_t col) {
  return static_cast<const std::int8_t*>(matrix.data) + row * matrix.cols + col;
}

template <class Product>
void Int8::decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                  typename Product::Element* to) {
  const std::int8_t* codes = int8_codes(matrix, row, col);
  const float scale = matrix.scales.absmax[row];
  const Vec::Reg factor = Vec::broadcast(scale), step = Vec::broadcast(kInt8Step);
  const auto elements = [&](std::int64_t i) { return Vec::mul(Vec::mul(Vec::load_i8(codes + i), factor), step); };
  std::int64_t i = 0;
  if constexpr (Product::kPerWord == 1) {
    for (; i + kWidth <= count; i += kWidth) Vec::store(to + i, elements(i));
  } else {
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) Product::store(to + i, {elements(i), elements(i + kWidth)});
  }
  for (; i < count; ++i) to[i] = Product::round(int8_element(codes[i], scale));
}

// The codes as numbers, exact in f32 and in bf16. From int to f32, the compiler would convert 16 bits at a time: 18
// AVX2 instructions for 32 codes instead of 12.
template <class Product>
void Int8::decode_unscaled(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                           typename Product::Element* to) {
  const std::int8_t* codes = int8_codes(matrix, row, col);
  std::int64_t i = 0;
  if constexpr (Product::kPerWord == 1) {
    for (; i + kWidth <= count; i += kWidth) Vec::store(to + i, Vec::load_i8(codes + i));
  }
  for (; i < count; ++i) to[i] = Product::exact(codes[i]);
}

// Adding and subtracting 3 * 2^22 rounds a value below 2^22 to an integer.
constexpr float kRound = 12582912.0f;

void Int8::quantize(const float* values, std::int64_t count, std::int64_t blocksize, float, std::uint8_t* codes,
                    float* scales) {
  for (const float* end = values + count; values != end; values += blocksize, codes += blocksize) {
    const float largest = max_abs(values, blocksize);
    const float factor = int8_factor(largest);
    *scales++ = largest;
    for (std::int64_t i = 0; i < blocksize; ++i) {
      const float rounded = values[i] * factor + kRound - kRound;
      codes[i] = static_cast<std::uint8_t>(static_cast<std::int32_t>(rounded));
    }
  }
}

// The element nearest to a value, which may exceed the largest, and its code.
PISSA_INLINE float Int8::nearest(float value, float scale, std::uint8_t& code) {
  const float scaled = value * int8_factor(scale);
  const float clamped = scaled > -kInt8Largest ? (scaled < kInt8Largest ? scaled : kInt8Largest) : -kInt8Largest;
  const float rounded = clamped + kRound - kRound;
  code = static_cast<std::uint8_t>(static_cast<std::int32_t>(rounded));
  return int8_element(rounded, scale);
}

// ---- x W^T for one to four rows of x -----------------------------------------------------------------------------
// Dot products directly from the bytes, in f32 on every instruction set: a code is exact, and a row's scale multiplies
// its sum. Reading the codes takes as long as multiplying them.

constexpr std::int64_t kInt8Run = 16384;  // elements of a row at a time: 4 rows of x fill half of B's panel
static_assert(kCodeDotRows * kInt8Run <= kNc * kKc);

// c[i, j] = or += x[i, 0 : count] . codes[j, 0 : count] * scales[j]; x is padded with zeros to whole vectors.
template <int rows, int cols>
void int8_tile(const std::int8_t* codes, std::int64_t ld, std::int64_t count, const float* x, const float* scales,
               float* c, bool accumulate) {
  Vec::Reg sum[rows][cols];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero();
  }
  const auto add = [&](std::int64_t k, const Vec::Reg(&values)[cols]) {
    for (int i = 0; i < rows; ++i) {
      const Vec::Reg x_k = Vec::load(x + i * kInt8Run + k);
      for (int j = 0; j < cols; ++j) sum[i][j] = Vec::fma(x_k, values[j], sum[i][j]);
    }
  };
  Vec::Reg values[cols];
  std::int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    for (int j = 0; j < cols; ++j) {
      __builtin_prefetch(codes + (j + cols) * ld + k);
      values[j] = Vec::load_i8(codes + j * ld + k);
    }
    add(k, values);
  }
  if (k < count) {  // the matrix may end here
    for (int j = 0; j < cols; ++j) {
      std::int8_t last[kWidth] = {};
      __builtin_memcpy(last, codes + j * ld + k, count - k);
      values[j] = Vec::load_i8(last);
    }
    add(k, values);
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      const float total = int8_element(Vec::reduce_add(sum[i][j]), scales[j]);
      c[i * kNc + j] = accumulate ? c[i * kNc + j] + total : total;
    }
  }
}

template <int rows = kCodeDotRows>
PISSA_INLINE void int8_rows(std::int64_t wanted, const Matrix& weight, const Block& block, std::int64_t k0,
                            std::int64_t count, const float* x, float* c, bool accumulate) {
  if constexpr (rows > 1) {
    if (wanted < rows) return int8_rows<rows - 1>(wanted, weight, block, k0, count, x, c, accumulate);
  }
  const float* scales = weight.scales.absmax + block.col;
  const std::int8_t* codes = int8_codes(weight, block.col, k0);
  std::int64_t j = 0;
  for (; j + 4 <= block.cols; j += 4) {
    int8_tile<rows, 4>(codes + j * weight.cols, weight.cols, count, x, scales + j, c + j, accumulate);
  }
  for (; j < block.cols; ++j) {
    int8_tile<rows, 1>(codes + j * weight.cols, weight.cols, count, x, scales + j, c + j, accumulate);
  }
}

// c = or += the term
template <class Product>
void Int8::dot(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  const std::int64_t inner = term.inner();
  for (std::int64_t k0 = 0; k0 < inner; k0 += kInt8Run) {
    const std::int64_t count = smaller(kInt8Run, inner - k0);
    for (std::int64_t i = 0; i < block.rows; ++i) {
      float* x = panels.b + i * kInt8Run;
      decode_elements(term.a, block.row + i, k0, count, term.scale, F32{}, x);
      const std::int64_t padded = ceil_div(count, kWidth) * kWidth;
      __builtin_memset(x + count, 0, (padded - count) * sizeof *x);
    }
    int8_rows(block.rows, term.b, block, k0, count, panels.b, panels.c, accumulate);
    accumulate = true;
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
