// x W^T for few rows of x and a weight in NF4: dot products straight from the packed bytes. Included by kernels.cc
// only.
//
// With M <= 16 rows a panel would be written once to be read once. Here a chunk of codes becomes two registers, its
// even and its odd elements, which meet x sorted the same way. Chunks lie where the flattened weight's blocks lie; x is
// padded with zeros, so that what a chunk holds of the neighbouring rows of W does not count.
#pragma once

#include "pack.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Up to this many rows the scale multiplies sums of a chunk, in f32, and the levels themselves are rounded to the
// product's elements; from there on that is dearer than rounding level * scale, as a panel does.
constexpr int kPostScaledRows = 4;

template <class Product>
bool can_dot(const Term& term) {
  return term.b.codec == Codec::nf4 && term.op_b == Op::t && term.op_a == Op::n &&
         term.b.scales.blocksize % (2 * Product::kDecodeBytes) == 0;
}

// Rows of x, even and odd elements apart, each with zeros before and after.
template <class Product>
struct SplitRows {
  static constexpr std::int64_t kPad = 2 * Product::kDecodeBytes;  // elements of a chunk
  using Element = typename Product::Element;
  Element* even;
  Element* odd;
  std::int64_t ld;

  static std::int64_t elements_per_row(std::int64_t count) {
    return ceil_div(ceil_div(count + 1, 2) + 2 * kPad, kPad) * kPad;  // whole cache lines
  }
};

template <class Product>
void split_rows(const Matrix& x, std::int64_t row, std::int64_t rows, std::int64_t k0, std::int64_t count, float scale,
                const SplitRows<Product>& to) {
  using Element = typename Product::Element;
  constexpr std::int64_t kPad = SplitRows<Product>::kPad;
  for (std::int64_t i = 0; i < rows; ++i) {
    Element* even = to.even + i * to.ld;
    Element* odd = to.odd + i * to.ld;
    __builtin_memset(static_cast<void*>(even), 0, to.ld * sizeof(Element));
    __builtin_memset(static_cast<void*>(odd), 0, to.ld * sizeof(Element));
    for (std::int64_t k = 0; k < count; k += kMaxRun) {
      Element values[kMaxRun + 1];
      const std::int64_t run = smaller(kMaxRun, count - k);
      decode_elements(x, row + i, k0 + k, run, scale, Product{}, values);
      values[run] = Element{};
      for (std::int64_t j = 0; j < (run + 1) / 2; ++j) {
        even[kPad + k / 2 + j] = values[2 * j];
        odd[kPad + k / 2 + j] = values[2 * j + 1];
      }
    }
  }
}

// c[i, n] = or += x[i, k0 : k0 + count] . W[n, k0 : k0 + count], for `rows` rows of x and the columns of the block.
template <class Product, int rows>
void dot_rows(const Matrix& weight, const Block& block, std::int64_t k0, std::int64_t count,
              const SplitRows<Product>& x, float* c, bool accumulate) {
  using Element = typename Product::Element;
  constexpr bool kPostScaled = rows <= kPostScaledRows;
  constexpr std::int64_t kChunk = 2 * Product::kDecodeBytes;
  constexpr std::int64_t kPad = SplitRows<Product>::kPad;
  const auto* codes = static_cast<const std::uint8_t*>(weight.data);
  const std::int64_t total = weight.rows * weight.cols;
  const std::int64_t blocksize = weight.scales.blocksize;
  const typename Product::Table levels = Product::table(kNf4Levels, 1.0f);
  for (std::int64_t n = 0; n < block.cols; ++n) {
    const std::int64_t first = (block.col + n) * weight.cols + k0;
    const std::int64_t end = first + count;
    std::int64_t at = first / kChunk * kChunk;
    // A chunk's even elements are even or odd ones of x, depending on where the row starts.
    const bool swapped = first % 2 != 0;
    const Element* high = swapped ? x.odd + kPad - (first - at + 1) / 2 : x.even + kPad - (first - at) / 2;
    const Element* low = swapped ? x.even + kPad - (first - at - 1) / 2 : x.odd + kPad - (first - at) / 2;
    Vec::Reg sum[rows];
    for (int i = 0; i < rows; ++i) sum[i] = Vec::zero();
    std::int64_t block_end = at;
    float absmax = 0.0f;
    typename Product::Table table = levels;
    for (; at < end; at += kChunk, high += kChunk / 2, low += kChunk / 2) {
      if (at >= block_end) {
        const std::int64_t index = at / blocksize;
        absmax = nf4_absmax(weight.scales, index);
        block_end = (index + 1) * blocksize;
        if constexpr (!kPostScaled) table = Product::table(kNf4Levels, absmax);
      }
      const std::uint8_t* bytes = codes + at / 2;
      std::uint8_t last[Product::kDecodeBytes];
      if (at + kChunk > total) {  // the weight ends inside this chunk
        __builtin_memset(last, 0x77, sizeof last);
        __builtin_memcpy(last, bytes, ceil_div(total, 2) - at / 2);
        bytes = last;
      }
      __builtin_prefetch(bytes + 1024);
      const Vec::Reg2 chunk = Product::decode_split(table, bytes);
      for (int i = 0; i < rows; ++i) {
        const Vec::Reg x_high = Vec::load(reinterpret_cast<const float*>(high + i * x.ld));
        const Vec::Reg x_low = Vec::load(reinterpret_cast<const float*>(low + i * x.ld));
        if constexpr (kPostScaled) {
          const Vec::Reg part = Product::mac(chunk.b, x_low, Product::mac(chunk.a, x_high, Vec::zero()));
          sum[i] = Vec::fma(part, Vec::broadcast(absmax), sum[i]);
        } else {
          sum[i] = Product::mac(chunk.b, x_low, Product::mac(chunk.a, x_high, sum[i]));
        }
      }
    }
    for (int i = 0; i < rows; ++i) {
      const float total_i = Vec::reduce_add(sum[i]);
      c[i * kNc + n] = accumulate ? c[i * kNc + n] + total_i : total_i;
    }
  }
}

template <class Product, int rows = kDotRows>
PISSA_INLINE void dispatch_dot(std::int64_t wanted, const Matrix& weight, const Block& block, std::int64_t k0,
                               std::int64_t count, const SplitRows<Product>& x, float* c, bool accumulate) {
  if (wanted == rows) return dot_rows<Product, rows>(weight, block, k0, count, x, c, accumulate);
  if constexpr (rows > 1) dispatch_dot<Product, rows - 1>(wanted, weight, block, k0, count, x, c, accumulate);
}

// c = or += the term, whose a has at most kDotRows rows
template <class Product>
void nf4_dot(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  using Element = typename Product::Element;
  // x fills at most B's panel: for 16 rows of bf16, 14 thousand columns at a time
  const std::int64_t capacity = kNc * kKc * Product::kPerWord / (2 * block.rows);
  const std::int64_t step = 2 * (capacity - 3 * SplitRows<Product>::kPad) - 2;
  const std::int64_t inner = term.inner();
  for (std::int64_t k0 = 0; k0 < inner; k0 += step) {
    const std::int64_t count = smaller(step, inner - k0);
    auto* even = reinterpret_cast<Element*>(panels.b);
    const std::int64_t ld = SplitRows<Product>::elements_per_row(count);
    const SplitRows<Product> x{even, even + block.rows * ld, ld};
    split_rows(term.a, block.row, block.rows, k0, count, term.scale, x);
    dispatch_dot<Product>(block.rows, term.b, block, k0, count, x, panels.c, accumulate);
    accumulate = true;
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
