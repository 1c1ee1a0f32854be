// Operands of a GEMM as panels of 32-bit words: one f32 each, or a pair of bf16 that are adjacent along the inner
// dimension. Included only by kernels.cc.
//
// Both operands are packed from the same two pieces. A matrix row that runs along the inner dimension is already a row
// of words (rows_along_inner). If rows run across it, each row, or each interleaved pair, is a row of words for all
// lanes at once (rows_across_inner). A strip needs one of the two orders (micro_kernel.h); the other is transposed, a
// square of kWidth x kWidth words at a time.
#pragma once

#include "pissa/cpu/kernels/decode.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// The number of words for `count` elements.
template <class Product>
constexpr std::int64_t words(std::int64_t count) {
  return ceil_div(count, Product::kPerWord);
}

// The data to be packed: op(matrix), with lanes [lead, lead + count), which are rows of A or columns of B, and elements
// [k0, k0 + depth) of the inner dimension, all times scale. For an INT8 matrix it may be the codes, only for
// rows_along_inner.
struct Slice {
  const Matrix& matrix;
  std::int64_t lead, count, k0, depth;
  float scale = 1.0f;
  bool codes = false;
};

// Prefetches elements of a row that will be packed soon. How many rows ahead: a row of codes takes about 50 ns to
// decode, and main memory about 100 ns to answer. Dense rows of A are read a strip at a time, between the products of
// others. So the next strip is prefetched into L2, where it does not evict what is in use from L1.
PISSA_INLINE void prefetch(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count) {
  const auto* data = static_cast<const char*>(matrix.data);
  if (is_quantized(matrix.format)) {
    row += 8;
    if (row >= matrix.rows) return;
    const std::int64_t first = row * matrix.cols + col;
    with_codes(matrix.format, [&](auto codes) {
      constexpr Format kFormat = decltype(codes)::kFormat;
      const std::int64_t end = code_bytes(kFormat, first + count);
      for (std::int64_t i = code_bytes(kFormat, first); i < end; i += 64) __builtin_prefetch(data + i);
      if constexpr (!is_read_only(kFormat)) {
        prefetch_scale(matrix.scales, codes.block(matrix.scales, row, col, matrix.cols));
      }
    });
  } else {
    row += 14;
    if (row >= matrix.rows) return;
    const std::int64_t size = element_size(matrix.format);
    const char* from = data + (row * matrix.ld + col) * size;
    for (std::int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
}

// Whether the matrix stores the product's elements in the needed form, so that panels can be made directly from it.
template <class Product>
PISSA_INLINE bool is_plain(const Slice& slice) {
  const Format format = Product::kPerWord == 1 ? Format::f32 : Format::bf16;
  return slice.matrix.format == format && slice.scale == 1.0f;
}

template <class Product>
PISSA_INLINE const typename Product::Element* plain_row(const Slice& slice, std::int64_t row, std::int64_t col) {
  return static_cast<const typename Product::Element*>(slice.matrix.data) + row * slice.matrix.ld + col;
}

// panel[lane * ld + word]; lanes from slice.count to `lanes` are zero.
template <class Product>
void rows_along_inner(const Slice& slice, std::int64_t lanes, std::int64_t ld, float* panel) {
  using Element = typename Product::Element;
  const std::int64_t length = words<Product>(slice.depth);
  for (std::int64_t lane = 0; lane < slice.count; ++lane) {
    const std::int64_t row = slice.lead + lane;
    prefetch(slice.matrix, row, slice.k0, slice.depth);
    auto* to = reinterpret_cast<Element*>(panel + lane * ld);
    to[Product::kPerWord * length - 1] = Element{};  // an odd last element is paired with 0
    if (slice.codes) Int8::decode_unscaled<Product>(slice.matrix, row, slice.k0, slice.depth, to);
    else decode_elements(slice.matrix, row, slice.k0, slice.depth, slice.scale, Product{}, to);
  }
  for (std::int64_t lane = slice.count; lane < lanes; ++lane) {
    __builtin_memset(panel + lane * ld, 0, length * sizeof(float));
  }
}

// strip[word * ld + lane] for strips of `width` lanes, with `stride` words from one strip to the next; lanes from
// slice.count to the end of a strip are zero. row: scratch for two rows of the slice.
template <class Product, int width>
void rows_across_inner(const Slice& slice, std::int64_t ld, std::int64_t stride, float* panel, float* row) {
  using Element = typename Product::Element;
  constexpr int kPerWord = Product::kPerWord;
  const std::int64_t padded = ceil_div(slice.count, width) * width;
  const bool plain = is_plain<Product>(slice) && slice.count == padded && padded % (kPerWord * kWidth) == 0;
  for (std::int64_t k = 0; k < slice.depth; k += kPerWord) {
    const Element* rows[kPerWord];  // a pair of them is about to be interleaved
    for (int partner = 0; partner < kPerWord; ++partner) {
      const std::int64_t at = slice.k0 + k + partner;
      const std::int64_t got = k + partner < slice.depth ? slice.count : 0;
      prefetch(slice.matrix, at, slice.lead, slice.count);
      if (plain && got > 0) {
        rows[partner] = plain_row<Product>(slice, at, slice.lead);
        continue;
      }
      Element* to = reinterpret_cast<Element*>(row) + partner * padded;
      if (got > 0) decode_elements(slice.matrix, at, slice.lead, got, slice.scale, Product{}, to);
      for (std::int64_t i = got; i < padded; ++i) to[i] = Element{};
      rows[partner] = to;
    }
    const auto load = [&](int partner, std::int64_t i) {
      return Vec::load(reinterpret_cast<const float*>(rows[partner] + i));
    };
    float* to = panel + k / kPerWord * ld;
    for (std::int64_t strip = 0; strip < padded; strip += width, to += stride) {
      if constexpr (kPerWord == 1) {
        for (int i = 0; i < width; i += kWidth) Vec::store(to + i, load(0, strip + i));
      } else {  // for a strip of an odd number of vectors, the last half is written where the next row of words comes
        for (int i = 0; i < width; i += 2 * kWidth) {
          const Vec::Reg2 pairs = Product::interleave({load(0, strip + i), load(1, strip + i)});
          Vec::store(to + i, pairs.a);
          Vec::store(to + i + kWidth, pairs.b);
        }
      }
    }
  }
}

// Whether kWidth lanes were decoded straight into words of every lane, `ld` apart; otherwise nothing is done.
template <class Product>
bool decoded_lanes(const Slice& slice, float* scratch, float* to, std::int64_t ld) {
  if constexpr (Product::kPerWord == 1) {
    const Matrix& matrix = slice.matrix;
    if (!is_quantized(matrix.format) || slice.scale != 1.0f || slice.codes) return false;
    return with_codes(matrix.format, [&](auto codes) {
      if constexpr (requires { codes.template decode_lanes<Vec>(matrix, 0, 0, 0, scratch, to, ld); }) {
        for (int i = 0; i < kWidth; ++i) prefetch(matrix, slice.lead + i, slice.k0, slice.depth);
        return codes.template decode_lanes<Vec>(matrix, slice.lead, slice.k0, slice.depth, scratch, to, ld);
      }
      return false;
    });
  }
  return false;
}

// to[i * ld_to + j] = from[j * ld_from + i] for kWidth values of j and i in [0, count), count rounded up to kWidth.
PISSA_INLINE void transpose(const float* from, std::int64_t ld_from, std::int64_t count, float* to,
                            std::int64_t ld_to) {
  for (std::int64_t i = 0; i < count; i += kWidth) {
    Vec::Reg square[kWidth];
    for (int j = 0; j < kWidth; ++j) square[j] = Vec::load(from + j * ld_from + i);
    Vec::transpose(square);
    for (int j = 0; j < kWidth; ++j) Vec::store(to + (i + j) * ld_to, square[j]);
  }
}

void transpose_matrix(const float* from, std::int64_t rows, std::int64_t cols, float* to) {
  for (std::int64_t i = 0; i < rows; i += kWidth) {
    const std::int64_t whole = rows - i < kWidth ? 0 : cols / kWidth * kWidth;
    transpose(from + i * cols, cols, whole, to + i, rows);
    for (std::int64_t k = i; k < smaller(i + kWidth, rows); ++k) {
      for (std::int64_t j = whole; j < cols; ++j) to[j * rows + k] = from[k * cols + j];
    }
  }
}

#if PISSA_HAS_BF16
// Pairs of rows become rows of words, which are transposed as such: half as many as there are numbers.
void transpose_to_bf16(const float* from, std::int64_t rows, std::int64_t cols, void* to) {
  constexpr std::int64_t kCols = 256, kRows = 2 * kWidth;
  float words[kWidth * kCols], row[kCols];
  const Matrix matrix{from, rows, cols, cols, Format::f32};
  for (std::int64_t first = 0; first < cols; first += kCols) {
    const std::int64_t count = smaller(kCols, cols - first);
    for (std::int64_t i = 0; i < rows; i += kRows) {
      rows_across_inner<Bf16, kRows>({matrix, first, count, i, kRows}, kCols, kRows, words, row);
      for (std::int64_t j = 0; j < count; j += kWidth) {
        Vec::Reg square[kWidth];
        for (int k = 0; k < kWidth; ++k) square[k] = Vec::load(words + k * kCols + j);
        Vec::transpose(square);
        float* out = static_cast<float*>(to) + ((first + j) * rows + i) / 2;
        for (std::int64_t k = 0; k < smaller(kWidth, count - j); ++k) Vec::store(out + k * rows / 2, square[k]);
      }
    }
  }
}
#else
constexpr auto transpose_to_bf16 = nullptr;
#endif

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
