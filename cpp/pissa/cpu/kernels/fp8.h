// FP8 codes. Included only by kernels.cc.
#pragma once

#include "pissa/core/fp8.h"
#include "pissa/cpu/kernels/any_format.h"
#include "pissa/cpu/kernels/reduce.h"
#include "pissa/cpu/kernels/scales.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

struct Fp8 {
  static constexpr Format kFormat = Format::fp8;
  static constexpr float kMostFactor = 0x1p119f;  // 256 times this is finite

  static PISSA_INLINE std::int64_t block(const Scales& scales, std::int64_t row, std::int64_t col, std::int64_t) {
    return row / scales.rows * scales.across + col / scales.blocksize;
  }

  static PISSA_INLINE bool has_nan(const std::uint8_t* codes, std::int64_t count) {
    std::uint8_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::uint8_t magnitude = codes[i] & 0x7f;
      largest = magnitude > largest ? magnitude : largest;
    }
    return largest == 0x7f;
  }

  // Each element is code * scale, rounded once to the product's elements.
  template <class Product>
  static void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                     typename Product::Element* to) {
    const auto* codes = static_cast<const std::uint8_t*>(matrix.data) + row * matrix.cols + col;
    const std::int64_t blocksize = matrix.scales.blocksize;
    const bool nan = has_nan(codes, count);  // rare; checking at once takes two instructions for a vector of bytes
    for (std::int64_t i = 0; i < count;) {
      const std::int64_t end = smaller(count, ((col + i) / blocksize + 1) * blocksize - col);
      const float scale = block_absmax(matrix.scales, block(matrix.scales, row, col + i, matrix.cols));
      const Vec::Reg factor = Vec::broadcast(scale * 256.0f);
      const std::int64_t whole = scale < kMostFactor && !nan ? end : i;
      for (; i + 2 * kWidth <= whole; i += 2 * kWidth) {
        Product::store(to + i,
                       {Vec::mul(Vec::load_f8(codes + i), factor), Vec::mul(Vec::load_f8(codes + i + kWidth), factor)});
      }
      for (; i < end; ++i) to[i] = Product::round(e4m3_value(codes[i]) * scale);
    }
  }

  static void quantize(const float* values, std::int64_t count, std::int64_t blocksize, float, std::uint8_t* codes,
                       float* scales) {
    for (const float* end = values + count; values != end; values += blocksize, codes += blocksize) {
      const float scale = e4m3_scale(max_abs(values, blocksize));
      *scales++ = scale;
      for (std::int64_t i = 0; i < blocksize; ++i) codes[i] = e4m3_code(over_scale(values[i], scale));
    }
  }
  static PISSA_INLINE float nearest(float value, float scale, std::uint8_t& code) {
    code = e4m3_code(over_scale(value, scale));
    return e4m3_value(code) * scale;
  }
  static PISSA_INLINE void pack(const std::uint8_t* codes, std::int64_t count, std::uint8_t* to) {
    __builtin_memcpy(to, codes, count);
  }

  // Products decode it, because there is no shorter way.
  template <class Product>
  static bool dots(const Term&, std::int64_t) {
    return false;
  }
  template <class Product>
  static void dot(const Term&, const Block&, const Panels&, bool) {}
};

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
