// Rows of a matrix as numbers to compute with, and numbers rounded to what a matrix stores. Included by kernels.cc
// only.
#pragma once

#include "pissa/core/nf4.h"
#include "pissa/cpu/kernels.h"
#include "pissa/cpu/vec/product.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A loop of vectors: memcpy, called for the kilobyte of a row, takes twice as long.
template <class Element>
PISSA_INLINE void copy_elements(const Element* from, std::int64_t count, Element* to) {
  constexpr std::int64_t kStep = kWidth * sizeof(float) / sizeof(Element);
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Vec::store(reinterpret_cast<float*>(to + i), Vec::load(reinterpret_cast<const float*>(from + i)));
  }
  for (; i < count; ++i) to[i] = from[i];
}

void decode_f16(const std::uint16_t* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Vec::store(to + i, Vec::load_f16(from + i));
  if (i == count) return;
  std::uint16_t last[kWidth] = {};
  float values[kWidth];
  __builtin_memcpy(last, from + i, (count - i) * sizeof *from);
  Vec::store(values, Vec::load_f16(last));
  __builtin_memcpy(to + i, values, (count - i) * sizeof *to);
}

void encode_f16(const float* from, std::int64_t count, std::uint16_t* to) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Vec::store_f16(to + i, Vec::load(from + i));
  if (i == count) return;
  float last[kWidth] = {};
  std::uint16_t values[kWidth];
  __builtin_memcpy(last, from + i, (count - i) * sizeof *from);
  Vec::store_f16(values, Vec::load(last));
  __builtin_memcpy(to + i, values, (count - i) * sizeof *to);
}

void decode_bf16(const std::uint16_t* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = widen_bf16(from[i]);
}

void encode_bf16(const float* from, std::int64_t count, std::uint16_t* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = round_to_bf16(from[i]);
}

// Scales of blocks [first, first + count).
void decode_absmax(const Nf4Scales& scales, std::int64_t first, std::int64_t count, float* to) {
  if (scales.absmax) {
    __builtin_memcpy(to, scales.absmax + first, count * sizeof *to);
    return;
  }
  const float offset = *scales.offset;
  for (std::int64_t i = 0; i < count;) {
    const std::int64_t nested_block = (first + i) / kNestedBlocksize;
    const std::int64_t run_end = smaller(count, (nested_block + 1) * kNestedBlocksize - first);
    const float nested_absmax = scales.nested_absmax[nested_block];
    for (; i + kWidth <= run_end; i += kWidth) {
      const Vec::Reg levels = Vec::gather(kDynamicMap, scales.absmax8 + first + i);
      Vec::store(to + i, Vec::add(Vec::mul(levels, Vec::broadcast(nested_absmax)), Vec::broadcast(offset)));
    }
    for (; i < run_end; ++i) to[i] = kDynamicMap[scales.absmax8[first + i]] * nested_absmax + offset;
  }
}

PISSA_INLINE int nf4_code_at(const std::uint8_t* codes, std::int64_t i) {
  return i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
}

// log2 of the block size, a power of two: a division by a variable takes as long as decoding a block.
PISSA_INLINE int log2_blocksize(const Nf4Scales& scales) { return __builtin_ctzll(scales.blocksize); }

// Elements [first, first + count) of the flattened matrix; both ends may lie inside a block or a byte. Each element is
// level * absmax, rounded once to the product's elements. Scales are decoded some blocks ahead, out of the way.
template <class Product>
void decode_nf4(const Matrix& matrix, std::int64_t first, std::int64_t count, typename Product::Element* to) {
  constexpr int kStep = 2 * Product::kDecodeBytes;
  constexpr std::int64_t kBlocks = 16;
  float absmax[kBlocks];
  const auto* codes = static_cast<const std::uint8_t*>(matrix.data);
  const int log2 = log2_blocksize(matrix.scales);
  const std::int64_t end = first + count;
  const std::int64_t blocks = (end + matrix.scales.blocksize - 1) >> log2;
  std::int64_t i = first;
  for (std::int64_t group = first >> log2; group < blocks; group += kBlocks) {
    const std::int64_t in_group = smaller(kBlocks, blocks - group);
    decode_absmax(matrix.scales, group, in_group, absmax);
    for (std::int64_t j = 0; j < in_group; ++j) {
      const std::int64_t block_end = smaller((group + j + 1) << log2, end);
      const typename Product::Table table = Product::table(kNf4Levels, absmax[j]);
      if (i % 2 != 0 && i < block_end) *to++ = Product::round(kNf4Levels[nf4_code_at(codes, i++)] * absmax[j]);
      for (; i + kStep <= block_end; i += kStep, to += kStep) Product::decode(table, codes + i / 2, to);
      for (; i < block_end; ++i) *to++ = Product::round(kNf4Levels[nf4_code_at(codes, i)] * absmax[j]);
    }
  }
}

void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count, float* out) {
  const std::int64_t offset = row * matrix.ld + col;
  switch (matrix.codec) {
    case Codec::f32:
      copy_elements(static_cast<const float*>(matrix.data) + offset, count, out);
      break;
    case Codec::bf16:
      decode_bf16(static_cast<const std::uint16_t*>(matrix.data) + offset, count, out);
      break;
    case Codec::f16:
      decode_f16(static_cast<const std::uint16_t*>(matrix.data) + offset, count, out);
      break;
    case Codec::nf4:
      decode_nf4<F32>(matrix, row * matrix.cols + col, count, out);
      break;
  }
}

void encode(const float* values, std::int64_t count, Codec codec, void* to) {
  switch (codec) {
    case Codec::f32:
      __builtin_memcpy(to, values, count * sizeof(float));
      break;
    case Codec::bf16:
      encode_bf16(values, count, static_cast<std::uint16_t*>(to));
      break;
    case Codec::f16:
      encode_f16(values, count, static_cast<std::uint16_t*>(to));
      break;
    case Codec::nf4:
      break;  // written by nf4_quantize only
  }
}

// Elements [col, col + count) of a row times scale, as elements of the product.
PISSA_INLINE void decode_elements(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                  float scale, F32, float* to) {
  decode(matrix, row, col, count, to);
  if (scale == 1.0f) return;
  for (std::int64_t i = 0; i < count; ++i) to[i] *= scale;
}

#if PISSA_HAS_BF16
PISSA_INLINE void decode_elements(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                  float scale, Bf16, Half* to) {
  if (scale == 1.0f && matrix.codec == Codec::bf16) {
    copy_elements(static_cast<const Half*>(matrix.data) + row * matrix.ld + col, count, to);
  } else if (scale == 1.0f && matrix.codec == Codec::nf4) {
    decode_nf4<Bf16>(matrix, row * matrix.cols + col, count, to);
  } else {
    constexpr std::int64_t kRun = 256;
    alignas(64) float values[kRun];
    for (std::int64_t i = 0; i < count; i += kRun) {
      const std::int64_t run = smaller(kRun, count - i);
      decode_elements(matrix, row, col + i, run, scale, F32{}, values);
      for (std::int64_t j = 0; j < run; ++j) to[i + j] = round_to_bf16(values[j]);
    }
  }
}
#endif

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
