// NF3 and NF2 codes. Included only by kernels.cc.
#pragma once

#include "pissa/core/nf4.h"
#include "pissa/core/normal_float.h"
#include "pissa/cpu/kernels/four_bits.h"
#include "pissa/cpu/kernels/reduce.h"
#include "pissa/cpu/kernels/scales.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

template <Format format>
struct FewBits {
  static constexpr Format kFormat = format;
  static constexpr int kBits = info(format).bits;
  static constexpr int kGroup = 8;  // codes in kBits bytes
  static constexpr unsigned kMask = (1u << kBits) - 1;

  static PISSA_INLINE std::int64_t block(const Scales& scales, std::int64_t row, std::int64_t col, std::int64_t cols) {
    return (row * cols + col) >> log2_blocksize(scales);
  }

  static PISSA_INLINE unsigned code_at(const std::uint8_t* codes, std::int64_t i) {
    const std::int64_t bit = i * kBits;
    unsigned word = codes[bit / 8];
    if (bit % 8 + kBits > 8) word |= static_cast<unsigned>(codes[bit / 8 + 1]) << 8;
    return word >> (bit % 8) & kMask;
  }

  // Both ends may be inside a block or a byte. Each element is level * absmax, rounded once to the product's elements.
  template <class Product>
  static void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                     typename Product::Element* to) {
    const auto* codes = static_cast<const std::uint8_t*>(matrix.data);
    const int log2 = log2_blocksize(matrix.scales);
    std::int64_t i = row * matrix.cols + col;
    const std::int64_t end = i + count;
    while (i < end) {
      const std::int64_t block_end = smaller(((i >> log2) + 1) << log2, end);
      const float absmax = block_absmax(matrix.scales, i >> log2);
      typename Product::Element levels[kMask + 1];
      for (unsigned code = 0; code <= kMask; ++code) {
        levels[code] = Product::round(NormalFloat<format>::kLevels[code] * absmax);
      }
      for (; i < block_end && i % kGroup != 0; ++i) *to++ = levels[code_at(codes, i)];
      for (; i + kGroup <= block_end; i += kGroup, to += kGroup) {
        const std::uint8_t* bytes = codes + i / kGroup * kBits;
        unsigned word = 0;
        for (int byte = 0; byte < kBits; ++byte) word |= static_cast<unsigned>(bytes[byte]) << (8 * byte);
        for (int j = 0; j < kGroup; ++j) to[j] = levels[word >> (kBits * j) & kMask];
      }
      for (; i < block_end; ++i) *to++ = levels[code_at(codes, i)];
    }
  }

  // As in NF4: whole blocks are multiplied by 1 / absmax, a short last one is divided by absmax.
  static void quantize(const float* values, std::int64_t count, std::int64_t blocksize, float, std::uint8_t* codes,
                       float* absmax) {
    for (std::int64_t first = 0; first < count; first += blocksize, codes += blocksize * kBits / 8) {
      const std::int64_t length = smaller(blocksize, count - first);
      const bool whole = length == blocksize;
      const float largest = max_abs(values + first, length);
      const float divisor = nf4_divisor(largest), factor = 1.0f / divisor;
      *absmax++ = whole ? largest : divisor;
      for (std::int64_t i = 0; i < length; i += kGroup) {
        const std::int64_t some = smaller(kGroup, length - i);
        std::uint8_t group[kGroup], bytes[kBits];
        for (std::int64_t j = 0; j < kGroup; ++j) {
          const float value = j < some ? values[first + i + j] : 0.0f;
          group[j] = normal_float_code<format>(whole ? value * factor : value / divisor);
        }
        pack(group, kGroup, bytes);
        __builtin_memcpy(codes + i * kBits / 8, bytes, ceil_div(some * kBits, 8));
      }
    }
  }

  static PISSA_INLINE float nearest(float value, float scale, std::uint8_t& code) {
    code = normal_float_code<format>(over_scale(value, scale));
    return NormalFloat<format>::kLevels[code] * scale;
  }

  static PISSA_INLINE void pack(const std::uint8_t* codes, std::int64_t count, std::uint8_t* to) {
    for (std::int64_t i = 0; i < count; i += kGroup, to += kBits) {
      const std::int64_t some = smaller(kGroup, count - i);
      unsigned word = 0;
      for (std::int64_t j = 0; j < some; ++j) word |= static_cast<unsigned>(codes[i + j]) << (kBits * j);
      for (std::int64_t byte = 0; 8 * byte < some * kBits; ++byte)
        to[byte] = static_cast<std::uint8_t>(word >> (8 * byte));
    }
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
