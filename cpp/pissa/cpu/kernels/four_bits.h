// Codes of four bits: decoding, multiplication by the codes themselves and, for all formats except NF4 (nf4.h),
// quantisation. Included only by kernels.cc.
#pragma once

#include "pissa/core/four_bits.h"
#include "pissa/cpu/kernels/any_format.h"
#include "pissa/cpu/kernels/reduce.h"
#include "pissa/cpu/kernels/scales.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// log2 of the block size, a power of two, because a division by a variable takes as long as decoding a block.
PISSA_INLINE int log2_blocksize(const Scales& scales) { return __builtin_ctzll(scales.blocksize); }

// The part that all of them share.
template <Format format>
struct PackedPairs {
  static constexpr Format kFormat = format;
  static constexpr bool kLowFirst = FourBits<format>::kLowFirst;
  static constexpr bool kHasMinimum = false;

  static PISSA_INLINE std::int64_t block(const Scales& scales, std::int64_t row, std::int64_t col, std::int64_t cols);
  template <class Product>
  static void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                     typename Product::Element* to);
  static PISSA_INLINE float element(const Matrix& matrix, std::int64_t row, std::int64_t col);
  static constexpr Ends kEnds = ends_of(FourBits<format>::kLevels);

  // For bytes.h: the level of each code; whether every 32 elements in columns [col, col + count) of a row have one
  // scale; the scales of these runs; and the codes of one.
  static PISSA_INLINE const float* levels() { return FourBits<format>::kLevels; }
  static PISSA_INLINE bool has_runs(const Matrix& matrix, std::int64_t col, std::int64_t count) {
    const std::int64_t blocksize = matrix.scales.blocksize;
    return blocksize >= 32 && matrix.cols % blocksize == 0 && (col | count) % 32 == 0;
  }
  static PISSA_INLINE void read_runs(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t runs,
                                     float* scales, float*) {
    const int log2 = log2_blocksize(matrix.scales), log2_runs = log2 - 5;  // of a block
    const std::int64_t first = (row * matrix.cols + col) >> log2, skipped = (col >> 5) & ((1 << log2_runs) - 1);
    decode_absmax(matrix.scales, first, ceil_div(skipped + runs, std::int64_t{1} << log2_runs), scales);
    for (std::int64_t i = runs - 1; i >= 0; --i) scales[i] = scales[(skipped + i) >> log2_runs];  // of run i or before
  }
  template <class Quads>
  static PISSA_INLINE auto run_at(const Matrix& matrix, std::int64_t row, std::int64_t col) {
    const auto* codes = static_cast<const std::uint8_t*>(matrix.data) + (row * matrix.cols + col) / 2;
    return Quads::template codes_in_turn<kLowFirst>(codes);
  }
  static PISSA_INLINE void pack(const std::uint8_t* codes, std::int64_t count, std::uint8_t* to);
  template <class V>
    requires V::kLoadsLanes
  static bool decode_lanes(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count, float* scratch,
                           float* to, std::int64_t ld);
  template <class Product>
  static bool dots(const Term& term, std::int64_t rows);
  template <class Product>
  static void dot(const Term& term, const Block& block, const Panels& panels, bool accumulate);
};

template <Format format>
PISSA_INLINE float level_of(const std::uint8_t* codes, std::int64_t i) {
  const bool high = (i % 2 == 0) != FourBits<format>::kLowFirst;
  return FourBits<format>::kLevels[high ? codes[i / 2] >> 4 : codes[i / 2] & 15];
}

template <Format format>
PISSA_INLINE std::int64_t PackedPairs<format>::block(const Scales& scales, std::int64_t row, std::int64_t col,
                                                     std::int64_t cols) {
  return (row * cols + col) >> log2_blocksize(scales);
}

template <Format format>
PISSA_INLINE float PackedPairs<format>::element(const Matrix& matrix, std::int64_t row, std::int64_t col) {
  const auto* codes = static_cast<const std::uint8_t*>(matrix.data);
  const float scale = block_absmax(matrix.scales, block(matrix.scales, row, col, matrix.cols));
  return level_of<format>(codes, row * matrix.cols + col) * scale;
}

// A cell is the unit that one table decodes: a block, or the `blocks` of one step if they are smaller. Both ends may be
// inside a cell, a block or a byte. Each element is level * scale, rounded once to the product's elements. Scales are
// decoded some cells ahead, so that decoding does not wait for them.
template <Format format, class Product, int blocks>
void decode_cells(const Matrix& matrix, std::int64_t first, std::int64_t count, typename Product::Element* to) {
  constexpr int kStep = 2 * Product::kDecodeBytes;
  constexpr std::int64_t kCells = 16;
  float scales[kCells * blocks];
  const auto* codes = static_cast<const std::uint8_t*>(matrix.data);
  const int log2 = log2_blocksize(matrix.scales);
  const int log2_cell = log2 + __builtin_ctz(blocks);
  const std::int64_t end = first + count;
  const std::int64_t cells = (end + (std::int64_t{1} << log2_cell) - 1) >> log2_cell;
  const std::int64_t last_block = (end - 1) >> log2;
  std::int64_t i = first;
  for (std::int64_t group = first >> log2_cell; group < cells; group += kCells) {
    const std::int64_t in_group = smaller(kCells, cells - group);
    const std::int64_t group_block = group * blocks;
    decode_absmax(matrix.scales, group_block, smaller(in_group * blocks, last_block + 1 - group_block), scales);
    for (std::int64_t j = 0; j < in_group; ++j) {
      const std::int64_t cell_end = smaller((group + j + 1) << log2_cell, end);
      const auto one = [&] {
        *to++ = Product::round(level_of<format>(codes, i) * scales[(i >> log2) - group_block]);
        ++i;
      };
      if (blocks == 1 || (i % kStep == 0 && i + kStep <= cell_end)) {
        const auto table = Product::template table<blocks>(FourBits<format>::kLevels, scales + j * blocks);
        if (i % 2 != 0 && i < cell_end) one();
        for (; i + kStep <= cell_end; i += kStep, to += kStep) {
          Product::template decode<FourBits<format>::kLowFirst>(table, codes + i / 2, to);
        }
      }
      while (i < cell_end) one();
    }
  }
}

template <Format format>
template <class Product>
void PackedPairs<format>::decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                 typename Product::Element* to) {
  const std::int64_t first = row * matrix.cols + col;
  if (count == 0) return;
  if constexpr (Product::kMostBlocks > 1 && info(format).blocks.least < 2 * Product::kDecodeBytes) {
    const std::int64_t blocks = 2 * Product::kDecodeBytes / matrix.scales.blocksize;
    if constexpr (Product::kMostBlocks > 2) {
      if (blocks == 4) return decode_cells<format, Product, 4>(matrix, first, count, to);
    }
    if (blocks == 2) return decode_cells<format, Product, 2>(matrix, first, count, to);
  }
  decode_cells<format, Product, 1>(matrix, first, count, to);
}

// to[k * ld + lane] = element col + k of row `row` + lane, for kWidth lanes: words of codes are transposed, not the
// elements, which are eight times as many bytes. False, and nothing is done, unless 32 elements share a scale in all
// lanes. scratch: a scale for each block and lane.
template <Format format>
template <class V>
  requires V::kLoadsLanes
bool PackedPairs<format>::decode_lanes(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                       float* scratch, float* to, std::int64_t ld) {
  constexpr std::int64_t kStep = 32;
  constexpr float kOne = 1.0f;
  const std::int64_t blocksize = matrix.scales.blocksize;
  if (blocksize < kStep || matrix.cols % blocksize != 0 || col % kStep != 0 || count % kStep != 0) return false;
  const int log2 = log2_blocksize(matrix.scales);
  const std::int64_t phase = col & (blocksize - 1);
  const std::int64_t blocks = ((phase + count - 1) >> log2) + 1;
  float* of_row = scratch + blocks * kWidth;
  for (int lane = 0; lane < kWidth; ++lane) {
    decode_absmax(matrix.scales, ((row + lane) * matrix.cols + col) >> log2, blocks, of_row);
    for (std::int64_t i = 0; i < blocks; ++i) scratch[i * kWidth + lane] = of_row[i];
  }
  const auto table = V::template table<1>(FourBits<format>::kLevels, &kOne);
  const auto* codes = static_cast<const std::uint8_t*>(matrix.data) + (row * matrix.cols + col) / 2;
  for (std::int64_t k = 0; k < count; k += kStep, codes += kStep / 2) {
    const typename V::Reg scale = V::load(scratch + ((phase + k) >> log2) * kWidth);
    typename V::Words words[4];
    V::load_lanes(codes, matrix.cols / 2, words);
    for (int word = 0; word < 4; ++word) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, to += ld) {
        V::store(to, V::mul(V::look_up(table, V::shift_right(words[word], 4 * (kLowFirst ? i : i ^ 1))), scale));
      }
    }
  }
  return true;
}

// Codes of an even number of elements.
template <Format format>
PISSA_INLINE void PackedPairs<format>::pack(const std::uint8_t* codes, std::int64_t count, std::uint8_t* to) {
  constexpr int kFirst = kLowFirst ? 0 : 4;
  for (std::int64_t i = 0; i < count; i += 2) {
    to[i / 2] = static_cast<std::uint8_t>(codes[i] << kFirst | codes[i + 1] << (4 - kFirst));
  }
}

// A format whose scales and codes FourBits defines. Elements are divided by the stored scale.
template <Format format>
struct Grouped : PackedPairs<format> {
  static void quantize(const float* values, std::int64_t count, std::int64_t blocksize, float global,
                       std::uint8_t* codes, float* scales) {
    for (std::int64_t first = 0; first < count; first += blocksize, codes += blocksize / 2) {
      const float scale = FourBits<format>::scale(max_abs(values + first, blocksize), global);
      *scales++ = scale;
      for (std::int64_t i = 0; i < blocksize; i += 2) {
        const std::uint8_t pair[] = {code(values[first + i], scale), code(values[first + i + 1], scale)};
        PackedPairs<format>::pack(pair, 2, codes + i / 2);
      }
    }
  }
  static PISSA_INLINE float nearest(float value, float scale, std::uint8_t& to) {
    to = code(value, scale);
    return FourBits<format>::kLevels[to] * scale;
  }

 private:
  static PISSA_INLINE std::uint8_t code(float value, float scale) {
    return FourBits<format>::code(over_scale(value, scale));
  }
};

// ---- x W^T for one to four rows of x -----------------------------------------------------------------------------
// Dot products directly from the packed bytes. A chunk of codes becomes two registers, its even and its odd elements,
// which are multiplied by x sorted in the same way. Chunks are aligned to the blocks of the flattened weight. x is
// padded with zeros, so that the elements of neighbouring rows of W in a chunk do not count.

// For this few rows, the scale multiplies the sums of a chunk, in f32, and the levels, rounded to the product's
// elements, stay in a register. For more rows it is cheaper to scale the levels, block by block.
constexpr int kPostScaledRows = 2;

template <Format format>
template <class Product>
bool PackedPairs<format>::dots(const Term& term, std::int64_t rows) {
  return rows <= kCodeDotRows && term.op_b == Op::t && term.op_a == Op::n &&
         term.b.scales.blocksize % (2 * Product::kDecodeBytes) == 0;
}

// Rows of x, with even and odd elements separate, each with zeros before and after.
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
    constexpr std::int64_t kRun = 1024;
    for (std::int64_t k = 0; k < count; k += kRun) {
      Element values[kRun + 1];
      const std::int64_t run = smaller(kRun, count - k);
      decode_elements(x, row + i, k0 + k, run, scale, Product{}, values);
      values[run] = Element{};
      for (std::int64_t j = 0; j < (run + 1) / 2; ++j) {
        even[kPad + k / 2 + j] = values[2 * j];
        odd[kPad + k / 2 + j] = values[2 * j + 1];
      }
    }
  }
}

// c[i, j] = or += x[i, k0 : k0 + count] . W[n + j, k0 : k0 + count] for `rows` rows of x and `cols` rows of W, which is
// more than one only if all rows start with a block. absmax: memory for the scales of their blocks.
template <Format format, class Product, int rows, int cols>
void dot_tile(const Matrix& weight, std::int64_t n, std::int64_t k0, std::int64_t count, const SplitRows<Product>& x,
              float* absmax, float* c, bool accumulate) {
  using Element = typename Product::Element;
  constexpr std::int64_t kChunk = SplitRows<Product>::kPad;
  constexpr bool kPostScaled = rows <= kPostScaledRows;
  const int log2 = log2_blocksize(weight.scales);
  const int log2_chunks = log2 - __builtin_ctz(kChunk);  // of a block
  const std::int64_t first = n * weight.cols + k0;
  const std::int64_t lead = first % kChunk;  // elements of the first chunk that belong to the previous row
  const std::int64_t chunks = ceil_div(lead + count, kChunk);
  const std::int64_t blocks = ((first + count - 1) >> log2) - (first >> log2) + 1;
  const std::int64_t phase = (first >> __builtin_ctz(kChunk)) & ((std::int64_t{1} << log2_chunks) - 1);
  const bool together = count == weight.cols && blocks << log2 == count;  // whole rows of whole blocks
  const std::uint8_t* bytes[cols];
  for (int j = 0; j < cols; ++j) {
    const std::int64_t start = first - lead + j * weight.cols;
    bytes[j] = static_cast<const std::uint8_t*>(weight.data) + start / 2;
    if (!together) decode_absmax(weight.scales, start >> log2, blocks, absmax + j * blocks);
  }
  if (together) decode_absmax(weight.scales, first >> log2, cols * blocks, absmax);
  // The first elements of a chunk's bytes are even or odd elements of x, depending on where the row starts.
  const bool odd = first % 2 != 0;
  const Element* one = odd ? x.odd + kChunk - (lead + 1) / 2 : x.even + kChunk - lead / 2;
  const Element* other = odd ? x.even + kChunk - (lead - 1) / 2 : x.odd + kChunk - lead / 2;
  const Element* high = FourBits<format>::kLowFirst ? other : one;
  const Element* low = FourBits<format>::kLowFirst ? one : other;
  Vec::Reg sum[rows][cols];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero();
  }
  const auto add_chunk = [&](std::int64_t chunk, const std::uint8_t* const(&codes)[cols]) {
    float scale[cols];
    Vec::Reg2 values[cols];
    for (int j = 0; j < cols; ++j) {
      scale[j] = absmax[j * blocks + ((phase + chunk) >> log2_chunks)];
      constexpr float kOne = 1.0f;
      const auto table = Product::template table<1>(FourBits<format>::kLevels, kPostScaled ? &kOne : scale + j);
      values[j] = Product::decode_split(table, codes[j]);
    }
    for (int i = 0; i < rows; ++i) {
      const std::int64_t k = chunk * (kChunk / 2) + i * x.ld;
      const Vec::Reg x_high = Vec::load(reinterpret_cast<const float*>(high + k));
      const Vec::Reg x_low = Vec::load(reinterpret_cast<const float*>(low + k));
      for (int j = 0; j < cols; ++j) {
        if constexpr (kPostScaled) {
          const Vec::Reg part = Product::mac(values[j].b, x_low, Product::mac(values[j].a, x_high, Vec::zero()));
          sum[i][j] = Vec::fma(part, Vec::broadcast(scale[j]), sum[i][j]);
        } else {
          sum[i][j] = Product::mac(values[j].b, x_low, Product::mac(values[j].a, x_high, sum[i][j]));
        }
      }
    }
  };
  const std::int64_t total = weight.rows * weight.cols;
  const std::int64_t ahead = cols * weight.cols / 2;  // in the rows after these
  const std::int64_t whole = smaller(chunks, (total - (first - lead)) / kChunk);
  for (std::int64_t chunk = 0; chunk < whole; ++chunk) {
    const std::uint8_t* codes[cols];
    for (int j = 0; j < cols; ++j) {
      codes[j] = bytes[j] + chunk * Product::kDecodeBytes;
      __builtin_prefetch(codes[j] + ahead);
    }
    add_chunk(chunk, codes);
  }
  if (whole < chunks) {  // the weight ends inside the last chunk
    std::uint8_t last[Product::kDecodeBytes] = {};
    const std::uint8_t* codes[cols];
    for (int j = 0; j < cols; ++j) codes[j] = last;
    __builtin_memcpy(last, bytes[0] + whole * Product::kDecodeBytes,
                     ceil_div(total, 2) - (first - lead) / 2 - whole * Product::kDecodeBytes);
    add_chunk(whole, codes);
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      const float sum_ij = Vec::reduce_add(sum[i][j]);
      c[i * kNc + j] = accumulate ? c[i * kNc + j] + sum_ij : sum_ij;
    }
  }
}

template <Format format, class Product, int rows>
void dot_rows(const Matrix& weight, const Block& block, std::int64_t k0, std::int64_t count,
              const SplitRows<Product>& x, float* absmax, float* c, bool accumulate) {
  std::int64_t j = 0;
  if (weight.cols % weight.scales.blocksize == 0) {
    for (; j + 3 <= block.cols; j += 3) {
      dot_tile<format, Product, rows, 3>(weight, block.col + j, k0, count, x, absmax, c + j, accumulate);
    }
  }
  for (; j < block.cols; ++j) {
    dot_tile<format, Product, rows, 1>(weight, block.col + j, k0, count, x, absmax, c + j, accumulate);
  }
}

template <Format format, class Product, int rows = kCodeDotRows>
PISSA_INLINE void dispatch_dot(std::int64_t wanted, const Matrix& weight, const Block& block, std::int64_t k0,
                               std::int64_t count, const SplitRows<Product>& x, float* absmax, float* c,
                               bool accumulate) {
  if (wanted == rows) return dot_rows<format, Product, rows>(weight, block, k0, count, x, absmax, c, accumulate);
  if constexpr (rows > 1)
    dispatch_dot<format, Product, rows - 1>(wanted, weight, block, k0, count, x, absmax, c, accumulate);
}

// c = or += the term
template <Format format>
template <class Product>
void PackedPairs<format>::dot(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  using Element = typename Product::Element;
  constexpr std::int64_t kStep = 16384;  // elements of a row at a time: 4 rows of x, in f32, fill half of B's panel
  static_assert(kCodeDotRows * (kStep + 6 * SplitRows<Product>::kPad) <= kNc * kKc);
  static_assert(4 * (kStep / 32 + 2) <= 32 * kKc);
  const std::int64_t inner = term.inner();
  for (std::int64_t k0 = 0; k0 < inner; k0 += kStep) {
    const std::int64_t count = smaller(kStep, inner - k0);
    auto* even = reinterpret_cast<Element*>(panels.b);
    const std::int64_t ld = SplitRows<Product>::elements_per_row(count);
    const SplitRows<Product> x{even, even + block.rows * ld, ld};
    split_rows(term.a, block.row, block.rows, k0, count, term.scale, x);
    dispatch_dot<format, Product>(block.rows, term.b, block, k0, count, x, panels.scratch, panels.c, accumulate);
    accumulate = true;
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
