// Blocks of GGUF files. Included only by kernels.cc.
#pragma once

#include "pissa/core/gguf.h"
#include "pissa/cpu/kernels/any_format.h"
#include "pissa/cpu/kernels/int8.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Sixteen codes of six bits in twelve bytes: the eight scales of a block, then its eight minima.
PISSA_INLINE void unpack_six_bits(const std::uint8_t* bytes, std::uint8_t (&codes)[16]) {
  std::uint32_t words[3];
  __builtin_memcpy(words, bytes, sizeof words);
  const std::uint32_t six = 0x3f3f3f3fu, four = 0x0f0f0f0fu, two = 0x03030303u;
  const std::uint32_t unpacked[4] = {words[0] & six, (words[2] & four) | (words[0] >> 6 & two) << 4, words[1] & six,
                                     (words[2] >> 4 & four) | (words[1] >> 6 & two) << 4};
  __builtin_memcpy(codes, unpacked, sizeof unpacked);
}

template <Format format>
struct GgufCodes {
  using Layout = Gguf<format>;
  static constexpr Format kFormat = format;
  static constexpr int kElements = static_cast<int>(info(format).blocks.usual);
  static constexpr int kBytes = info(format).block_bytes;
  static constexpr int kGroups = kElements / Layout::kGroup;
  static constexpr int kRuns = kElements / Layout::kRun;

  // A block whose codes are bytes.
  struct Unpacked {
    alignas(64) std::int8_t codes[kElements];
    float scales[kGroups];
    float minima[kGroups];

    // Elements [i, i + kWidth), which are of one group.
    PISSA_INLINE Vec::Reg elements(int i) const {
      const Vec::Reg code = Vec::load_i8(codes + i), scale = Vec::broadcast(scales[i / Layout::kGroup]);
      if constexpr (Layout::kHasMinimum) return Vec::fma(code, scale, Vec::broadcast(minima[i / Layout::kGroup]));
      else return Vec::mul(code, scale);
    }
    PISSA_INLINE float element(int i) const {
      const float product = scales[i / Layout::kGroup] * static_cast<float>(codes[i]);
      if constexpr (Layout::kHasMinimum) return product + minima[i / Layout::kGroup];
      else return product;
    }
  };

  static PISSA_INLINE const std::uint8_t* block_at(const Matrix& matrix, std::int64_t row, std::int64_t col) {
    const std::int64_t blocks = row * (matrix.cols / kElements) + col / kElements;
    return static_cast<const std::uint8_t*>(matrix.data) + blocks * kBytes;
  }

  static PISSA_INLINE void unpack_scales(const std::uint8_t* block, Unpacked& to) {
    if constexpr (Layout::kSixBits) {
      std::uint8_t codes[16];
      unpack_six_bits(block + 4, codes);
      const float scale = half_at(block, 0), minimum = -half_at(block, 2);
      for (int i = 0; i < kGroups; ++i) to.scales[i] = scale * static_cast<float>(codes[i]);
      for (int i = 0; i < kGroups; ++i) to.minima[i] = minimum * static_cast<float>(codes[8 + i]);
    } else {
      for (int i = 0; i < kGroups; ++i) to.scales[i] = Layout::scale(block, i);
      if constexpr (Layout::kHasMinimum) {
        for (int i = 0; i < kGroups; ++i) to.minima[i] = Layout::minimum(block, i);
      }
    }
  }

  // Runs [first, end) of a block, as the core's gguf_code has them. The loops over a run are vectorised.
  static PISSA_INLINE void unpack_runs(const std::uint8_t* block, int first, int end, Unpacked& to) {
    std::uint8_t fifth[Layout::kFifthBits > 0 ? kElements : 1];
    if constexpr (Layout::kFifthBits > 0) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, block + Layout::kFifthBits, sizeof bits);
      for (int i = 0; i < kElements; ++i) fifth[i] = static_cast<std::uint8_t>((bits >> i & 1u) << 4);
    }
    for (int run = first; run < end; ++run) {
      std::int8_t* codes = to.codes + run * Layout::kRun;
      const BlockBits low = Layout::low(run), high = Layout::high(run);
      for (int i = 0; i < Layout::kRun; ++i) {
        int code = block[low.byte + i] >> low.shift & low.mask;
        if constexpr (Layout::kHighBits > 0) code |= (block[high.byte + i] >> high.shift & high.mask) << Layout::kHighBits;
        if constexpr (Layout::kFifthBits > 0) code |= fifth[run * Layout::kRun + i];
        if constexpr (Layout::kLevels != nullptr) codes[i] = Layout::kLevels[code];
        else codes[i] = static_cast<std::int8_t>(code - Layout::kBias);
      }
    }
  }

  // Both ends may be inside a block or a run. Each element is rounded once to the product's elements.
  template <class Product>
  static void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                     typename Product::Element* to) {
    constexpr int kStep = 2 * kWidth;
    const std::uint8_t* block = block_at(matrix, row, col);
    int i = static_cast<int>(col % kElements);
    for (; count > 0; block += kBytes, i = 0) {
      const int end = static_cast<int>(smaller(kElements, i + count));
      Unpacked unpacked;
      unpack_scales(block, unpacked);
      unpack_runs(block, i / Layout::kRun, (end - 1) / Layout::kRun + 1, unpacked);
      count -= end - i;
      while (i < end) {
        if (i % kStep == 0 && i + kStep <= end) {
          Product::store(to, {unpacked.elements(i), unpacked.elements(i + kWidth)});
          i += kStep, to += kStep;
        } else {
          *to++ = Product::round(unpacked.element(i++));
        }
      }
    }
  }

  template <class Product>
  static bool dots(const Term& term, std::int64_t rows) {
    return rows <= kCodeDotRows && term.op_a == Op::n && term.op_b == Op::t;
  }
  template <class Product>
  static void dot(const Term& term, const Block& block, const Panels& panels, bool accumulate);
};

// ---- x W^T for one to four rows of x -----------------------------------------------------------------------------
// Dot products of decoded elements, which stay in registers, in f32 on every instruction set.

constexpr int kGgufCols = Vec::kRegisters == 32 ? 4 : 2;

// c[i, j] = or += x[i, 0 : count] . W[j, 0 : count], where rows of W are `ld` bytes apart.
template <Format format, int rows, int cols>
void gguf_tile(const std::uint8_t* weight, std::int64_t ld, std::int64_t count, const float* x, float* c,
               bool accumulate) {
  using Codes = GgufCodes<format>;
  Vec::Reg sum[rows][cols];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero();
  }
  for (std::int64_t k = 0; k < count; k += Codes::kElements, weight += Codes::kBytes, x += Codes::kElements) {
    typename Codes::Unpacked blocks[cols];
    for (int j = 0; j < cols; ++j) {
      __builtin_prefetch(weight + j * ld + 2048);
      Codes::unpack_scales(weight + j * ld, blocks[j]);
      Codes::unpack_runs(weight + j * ld, 0, Codes::kRuns, blocks[j]);
    }
    for (int at = 0; at < Codes::kElements; at += kWidth) {
      Vec::Reg values[cols];
      for (int j = 0; j < cols; ++j) values[j] = blocks[j].elements(at);
      for (int i = 0; i < rows; ++i) {
        const Vec::Reg x_k = Vec::load(x + i * kInt8Run + at);
        for (int j = 0; j < cols; ++j) sum[i][j] = Vec::fma(x_k, values[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      const float total = Vec::reduce_add(sum[i][j]);
      c[i * kNc + j] = accumulate ? c[i * kNc + j] + total : total;
    }
  }
}

template <Format format, int rows = kCodeDotRows>
PISSA_INLINE void gguf_rows(std::int64_t wanted, const Matrix& weight, const Block& block, std::int64_t k0,
                            std::int64_t count, const float* x, float* c, bool accumulate) {
  if constexpr (rows > 1) {
    if (wanted < rows) return gguf_rows<format, rows - 1>(wanted, weight, block, k0, count, x, c, accumulate);
  }
  const std::int64_t ld = code_bytes(format, weight.cols);
  const std::uint8_t* first = GgufCodes<format>::block_at(weight, block.col, k0);
  std::int64_t j = 0;
  for (; j + kGgufCols <= block.cols; j += kGgufCols) {
    gguf_tile<format, rows, kGgufCols>(first + j * ld, ld, count, x, c + j, accumulate);
  }
  for (; j < block.cols; ++j) gguf_tile<format, rows, 1>(first + j * ld, ld, count, x, c + j, accumulate);
}

// c = or += the term
template <Format format>
template <class Product>
void GgufCodes<format>::dot(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  const std::int64_t inner = term.inner();
  for (std::int64_t k0 = 0; k0 < inner; k0 += kInt8Run) {
    const std::int64_t count = smaller(kInt8Run, inner - k0);
    for (std::int64_t i = 0; i < block.rows; ++i) {
      decode_elements(term.a, block.row + i, k0, count, term.scale, F32{}, panels.b + i * kInt8Run);
    }
    gguf_rows<format>(block.rows, term.b, block, k0, count, panels.b, panels.c, accumulate);
    accumulate = true;
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
