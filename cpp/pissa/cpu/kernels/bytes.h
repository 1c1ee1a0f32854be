// Products with a weight in integers of 8 bits. Included only by kernels.cc.
//
// An element is scale * byte, with a scale for each run (kByteRun) of a row of the first operand, and for each block of
// runs (ByteBlocks) of a column of op(b). Rows are rounded once, before the product (round_row); the weight, whenever
// it is packed, from its codes of four bits by a table of 16 bytes for each of its scales, or from its elements. A
// run's products are added up in int32, exactly. Runs are added up in f32, and so are blocks.
#pragma once

#include "pissa/core/int8.h"
#include "pissa/cpu/kernels/micro_kernel.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

#if PISSA_HAS_BYTES

constexpr int kLargestByte = Bytes::kLargest;
constexpr std::int64_t kPanelBlocks = 4;  // of a panel of B at most: 1,024 elements
constexpr std::int64_t kByteWords = kMostByteBlock / 4;
static_assert(kPanelBlocks * (kByteWords + 1) + 1 <= kKc + kPanelPad && kPanelBlocks * kByteWords <= kStripLd);

// The integer nearest to a value below 2^22, ties to even, modulo 2^22.
PISSA_INLINE std::uint32_t nearest_integer(float value) {
  constexpr float kRound = 12582912.0f;  // 3 * 2^22
  return __builtin_bit_cast(std::uint32_t, value + kRound);
}

constexpr float kMostOfWeight = Bytes::kLargest, kWeightStep = 1.0f / kMostOfWeight;

PISSA_INLINE float weight_factor(float largest) { return int8_factor(largest) * (kMostOfWeight / kInt8Largest); }

// to[i] = values[i] * factor in bytes, plus the offset; what is not finite becomes any byte.
void round_bytes(const float* values, std::int64_t count, float factor, int offset, std::uint8_t* to) {
  for (std::int64_t i = 0; i < count; ++i)
    to[i] = static_cast<std::uint8_t>(nearest_integer(values[i] * factor) + offset);
}

void round_row(const Matrix& a, std::int64_t row, float scale, const ByteRows& to) {
  const std::int64_t first = row * to.runs();
  const std::int64_t* apart = to.apart;
  float* of_apart = to.of_apart + row * to.apart_count;
  for (std::int64_t i = 0; i < to.runs(); ++i) {
    float values[kByteRun] = {};
    const std::int64_t k = i * kByteRun;
    auto* bytes = reinterpret_cast<std::uint8_t*>(to.bytes + row * to.length() + k);
    if (k < a.cols) decode_elements(a, row, k, smaller(kByteRun, a.cols - k), scale, F32{}, values);
    for (; apart != to.apart + to.apart_count && *apart < k + kByteRun; ++apart) {
      *of_apart++ = values[*apart - k];
      values[*apart - k] = 0.0f;
    }
    const float largest = max_abs(values, kByteRun);  // not finite if an element is not
    to.scales[first + i] = largest * kInt8Step;
    round_bytes(values, kByteRun, int8_factor(largest), 0, bytes);
    std::int32_t sum = 0;
    for (std::int64_t j = 0; j < kByteRun; ++j) sum += static_cast<std::int8_t>(bytes[j]);
    to.starts[first + i] = -Bytes::kOffset * sum;
  }
}

// ---- The weight's side

// Where a panel goes: strips of kTileCols lanes, `stride` words apart. The lanes' scales for each block come after its
// words.
struct ByteStrips {
  float* words;
  float* scales;
  std::int64_t stride;

  PISSA_INLINE std::uint8_t* word(std::int64_t lane, std::int64_t k) const {
    return reinterpret_cast<std::uint8_t*>(words + lane / kTileCols * stride + k * kTileCols + lane % kTileCols);
  }
  PISSA_INLINE float* scale(std::int64_t lane, std::int64_t block = 0) const {
    return scales + lane / kTileCols * stride + block * kTileCols + lane % kTileCols;
  }
  // The same from a block on, `words` words deep.
  PISSA_INLINE ByteStrips from(std::int64_t block, std::int64_t deep) const {
    return {words + block * deep * kTileCols, scales + block * kTileCols, stride};
  }
};

constexpr int kCodesRun = 32;  // elements of codes that are looked up at once

// The largest |element| that codes of the format can stand for in each run: of the lowest and of the highest level.
template <class Codes>
PISSA_INLINE Vec::Reg most_of(const float* scale, const float* minimum) {
  const Vec::Reg factor = Vec::load(scale);
  const Vec::Reg least = Codes::kHasMinimum ? Vec::load(minimum) : Vec::zero();
  const Vec::Reg ends[] = {Vec::fma(factor, Vec::broadcast(Codes::kEnds.lowest), least),
                           Vec::fma(factor, Vec::broadcast(Codes::kEnds.highest), least)};
  return Vec::max_bits(Vec::abs(ends[0]), Vec::abs(ends[1]));
}

// Elements [col, col + count) of a row in bytes, at most kPanelBlocks blocks of them, and a scale for each block.
// False, and nothing is done, unless they are whole runs of codes of four bits that share a scale.
template <class Codes>
bool round_codes(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count, std::int64_t size,
                 std::uint8_t* to, float* scales) {
  constexpr int kMostRuns = kPanelBlocks * kMostByteBlock / kCodesRun;
  static_assert(kMostRuns % kWidth == 0);
  if (!Codes::has_runs(weight, col, count)) return false;
  float scale[kMostRuns] = {}, minimum[kMostRuns] = {}, most[kMostRuns];
  const std::int64_t runs = count / kCodesRun;
  Codes::read_runs(weight, row, col, runs, scale, minimum);
  for (int i = 0; i < kMostRuns; i += kWidth) Vec::store(most + i, most_of<Codes>(scale + i, minimum + i));
  for (std::int64_t first = 0; first < runs; first += size / kCodesRun, ++scales) {
    const std::int64_t last = smaller(runs, first + size / kCodesRun);
    const float largest = max_abs(most + first, last - first), factor = weight_factor(largest);
    *scales = largest * kWeightStep;
    for (std::int64_t i = first; i < last; ++i, to += kCodesRun) {
      const auto table =
          Bytes::table(Codes::levels(), scale[i] * factor, Codes::kHasMinimum ? minimum[i] * factor : 0.0f);
      Bytes::look_up(table, Codes::template run_at<Bytes>(weight, row, col + i * kCodesRun), to);
    }
  }
  return true;
}

// The same for any elements.
void round_weight_row(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count, std::int64_t size,
                      std::uint8_t* to, float* scales) {
  if (is_quantized(weight.format) && with_codes(weight.format, [&](auto codes) {
        using Codes = decltype(codes);
        if constexpr (requires { Codes::has_runs(weight, 0, 0); }) {
          return round_codes<Codes>(weight, row, col, count, size, to, scales);
        }
        return false;
      })) {
    return;
  }
  for (std::int64_t k = 0; k < count; k += size, to += size) {
    float values[kMostByteBlock];
    const std::int64_t in_block = smaller(size, count - k);
    decode_elements(weight, row, col + k, in_block, 1.0f, F32{}, values);
    const float largest = max_abs(values, in_block);
    *scales++ = largest * kWeightStep;
    round_bytes(values, in_block, weight_factor(largest), Bytes::kOffset, to);
  }
}

// Lanes are rows of the weight: op(b) is its transpose. Their elements from k0 on are packed, `depth` of them, and
// zeros up to whole blocks.
void pack_byte_rows(const Matrix& weight, const Block& block, std::int64_t k0, std::int64_t depth, std::int64_t size,
                    std::int64_t blocks, float* scratch, const ByteStrips& to) {
  const std::int64_t lanes = ceil_div(block.cols, kTileCols) * kTileCols;
  for (std::int64_t lane = 0; lane < lanes; lane += kWidth) {
    for (int i = 0; i < kWidth; ++i) {
      auto* bytes = reinterpret_cast<std::uint8_t*>(scratch + i * kKc);
      const std::int64_t row = block.col + lane + i, filled = lane + i < block.cols ? depth : 0;
      float scales[kPanelBlocks] = {};
      if (filled > 0) {
        prefetch(weight, row, k0, depth);
        round_weight_row(weight, row, k0, depth, size, bytes, scales);
      }
      for (std::int64_t j = 0; j < blocks; ++j) *to.scale(lane + i, j) = scales[j];
      __builtin_memset(bytes + filled, Bytes::kOffset, blocks * size - filled);
    }
    transpose(scratch, kKc, blocks * size / 4, reinterpret_cast<float*>(to.word(lane, 0)), kTileCols);
  }
}

// Lanes are columns of the weight, of which `depth` rows are packed, and zeros up to `size`. From codes of four bits:
// false, and nothing is done, unless each kCodesRun lanes share a scale in every row.
template <class Codes>
bool pack_byte_columns_of(const Matrix& weight, const Block& block, std::int64_t k0, std::int64_t depth,
                          std::int64_t size, float* scratch, const ByteStrips& to) {
  constexpr int kRuns = kNc / kCodesRun;
  static_assert(kCodesRun % kTileCols == 0);
  static_assert(2 * kRuns * kMostByteBlock <= 32 * kKc && kRuns % kWidth == 0);
  if (!Codes::has_runs(weight, block.col, block.cols)) return false;
  const std::int64_t runs = block.cols / kCodesRun;
  float* const scales = scratch;
  float* const minima = scratch + kRuns * kMostByteBlock;
  float factor[kRuns] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    Codes::read_runs(weight, k0 + k, block.col, runs, scales + k * kRuns, minima + k * kRuns);
  }
  for (int i = 0; i < runs; i += kWidth) {
    Vec::Reg most = Vec::zero();
    for (std::int64_t k = 0; k < depth; ++k) {
      most = Vec::max_bits(most, most_of<Codes>(scales + k * kRuns + i, minima + k * kRuns + i));
    }
    Vec::store(factor + i, most);
  }
  for (std::int64_t i = 0; i < runs; ++i) {
    for (std::int64_t lane = 0; lane < kCodesRun; ++lane) *to.scale(i * kCodesRun + lane) = factor[i] * kWeightStep;
    factor[i] = weight_factor(factor[i]);
  }
  for (std::int64_t k = 0; k < size; k += 4) {
    for (std::int64_t i = 0; i < runs; ++i) {
      typename Bytes::Table tables[4];
      typename Bytes::Codes codes[4];
      for (int row = 0; row < 4; ++row) {
        const bool given = k + row < depth;
        const std::int64_t at = (given ? k + row : 0) * kRuns + i;
        const float scale = given ? factor[i] : 0.0f;
        tables[row] = Bytes::table(Codes::levels(), scales[at] * scale, Codes::kHasMinimum ? minima[at] * scale : 0.0f);
        codes[row] = Codes::template run_at<Bytes>(weight, given ? k0 + k + row : k0, block.col + i * kCodesRun);
      }
      std::uint8_t words[4 * kCodesRun];
      Bytes::look_up_four(tables, codes, words);
      for (std::int64_t lane = 0; lane < kCodesRun; lane += kTileCols) {
        __builtin_memcpy(to.word(i * kCodesRun + lane, k / 4), words + 4 * lane, 4 * kTileCols);
      }
    }
  }
  return true;
}

// The same from the elements of any format.
void pack_byte_columns(const Matrix& weight, const Block& block, std::int64_t k0, std::int64_t depth, std::int64_t size,
                       float* scratch, const ByteStrips& to) {
  static_assert(kMostByteBlock * kTileCols <= 32 * kKc);
  if (is_quantized(weight.format) && with_codes(weight.format, [&](auto codes) {
        using Codes = decltype(codes);
        if constexpr (requires { Codes::has_runs(weight, 0, 0); }) {
          return pack_byte_columns_of<Codes>(weight, block, k0, depth, size, scratch, to);
        }
        return false;
      })) {
    return;
  }
  for (std::int64_t lead = 0; lead < block.cols; lead += kTileCols) {
    const std::int64_t lanes = smaller(kTileCols, block.cols - lead);
    __builtin_memset(scratch, 0, size * kTileCols * sizeof *scratch);
    for (std::int64_t k = 0; k < depth; ++k) {
      decode_elements(weight, k0 + k, block.col + lead, lanes, 1.0f, F32{}, scratch + k * kTileCols);
    }
    float factor[kTileCols];
    for (int i = 0; i < kTileCols; i += kWidth) {
      Vec::Reg most = Vec::zero();
      for (std::int64_t k = 0; k < depth; ++k)
        most = Vec::max_bits(most, Vec::abs(Vec::load(scratch + k * kTileCols + i)));
      Vec::store(factor + i, most);
    }
    for (int i = 0; i < kTileCols; ++i) {
      to.scale(lead)[i] = factor[i] * kWeightStep;
      factor[i] = weight_factor(factor[i]);
    }
    for (std::int64_t k = 0; k < size; k += 4) {
      const float* row = scratch + k * kTileCols;
      std::uint32_t words[kTileCols];
      for (int i = 0; i < kTileCols; ++i) {
        const auto byte = [&](int at) {
          return ((nearest_integer(row[at * kTileCols + i] * factor[i]) + Bytes::kOffset) & 255) << (8 * at);
        };
        words[i] = byte(0) | byte(1) | byte(2) | byte(3);
      }
      __builtin_memcpy(to.word(lead, k / 4), words, sizeof words);
    }
  }
}

// ---- The product

constexpr int kByteRows = Vec::kRows / 2;      // of a tile: the other registers hold its sums in f32
constexpr int kByteStripRows = 4 * kByteRows;  // that read a block of B in L1
static_assert(kByteStripRows <= kStripRows);

// One block for a tile of the output, of `runs` runs.
struct ByteTile {
  std::int64_t runs, ld_scales;
  const float* a;         // rows kStripLd apart
  const float* a_scales;  // rows ld_scales apart, as the starts
  const std::int32_t* starts;
  const float* b;  // a block of a strip, and its lanes' scales
  const float* b_scales;
  float* c;  // rows kNc apart
  bool accumulate;
};

template <int rows>
void byte_kernel(const ByteTile& tile) {
  constexpr int kVecs = 2;
  constexpr std::int64_t kWords = kByteRun / 4;
  Vec::Reg total[rows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kVecs; ++j) total[i][j] = Vec::zero();
  }
  for (std::int64_t run = 0; run < tile.runs; ++run) {
    Bytes::Sum sum[rows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < kVecs; ++j) sum[i][j] = Bytes::broadcast_int(tile.starts[i * tile.ld_scales + run]);
    }
#pragma GCC unroll 8  // 6% faster than a loop over the run's words
    for (std::int64_t k = 0; k < kWords; k += 2) {
      const std::int64_t word = run * kWords + k;
      accumulate_tile<Bytes, rows, kVecs>(2, tile.a + word, tile.b + word * kTileCols, sum);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec::Reg scale = Vec::broadcast(tile.a_scales[i * tile.ld_scales + run]);
      for (int j = 0; j < kVecs; ++j) total[i][j] = Vec::fma(Bytes::to_float(sum[i][j]), scale, total[i][j]);
    }
  }
  Vec::Reg scale[kVecs];
  for (int j = 0; j < kVecs; ++j) scale[j] = Vec::load(tile.b_scales + j * kWidth);
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kVecs; ++j) {
      float* c = tile.c + i * kNc + j * kWidth;
      Vec::store(c, Vec::fma(total[i][j], scale[j], tile.accumulate ? Vec::load(c) : Vec::zero()));
    }
  }
}

// The block's sums = the term, whose a has been rounded.
template <class Output>
void multiply_bytes(const Term& term, const ByteRows& x, const Block& block, const Panels& panels, bool last,
                    const Output& output) {
  const auto [count, size] = x.blocks;
  const std::int64_t runs = size / kByteRun, words = size / 4,
                     of_panel = ceil_div(count, ceil_div(count, kPanelBlocks));
  for (std::int64_t first = 0; first < count; first += of_panel) {
    const std::int64_t blocks = smaller(of_panel, count - first);
    const std::int64_t k0 = first * size, depth = smaller(blocks * size, term.inner() - k0);
    const std::int64_t stride = blocks * (words + 1) * kTileCols + kTileCols;
    const ByteStrips strips{panels.b, panels.b + blocks * words * kTileCols, stride};
    if (term.op_b == Op::t) {
      pack_byte_rows(term.b, block, k0, depth, size, blocks, panels.scratch, strips);
    } else {
      for (std::int64_t i = 0; i < blocks; ++i) {
        pack_byte_columns(term.b, block, k0 + i * size, smaller(size, depth - i * size), size, panels.scratch,
                          strips.from(i, words));
      }
    }
    for (std::int64_t i = 0; i < block.rows; i += kByteStripRows) {
      const std::int64_t rows = smaller(kByteStripRows, block.rows - i);
      for (std::int64_t row = 0; row < rows; ++row) {
        const auto* from = reinterpret_cast<const float*>(x.bytes + (block.row + i + row) * x.length() + k0);
        copy_elements(from, blocks * words, panels.a + row * kStripLd);
      }
      float* const c = panels.c + i * kNc;
      for (std::int64_t j = 0; j < block.cols; j += kTileCols) {
        const float* b = panels.b + j / kTileCols * stride;
        for (std::int64_t k = 0; k < blocks; ++k) {
          for (std::int64_t row = 0; row < rows; row += kByteRows) {
            const std::int64_t at = (block.row + i + row) * x.runs() + (first + k) * runs;
            const ByteTile tile{runs,
                                x.runs(),
                                panels.a + row * kStripLd + k * words,
                                x.scales + at,
                                x.starts + at,
                                b + k * words * kTileCols,
                                b + (blocks * words + k) * kTileCols,
                                c + row * kNc + j,
                                first + k > 0};
            dispatch_rows<kByteRows, 1>(smaller(kByteRows, rows - row),
                                        [&](auto number) { byte_kernel<decltype(number)::kRows>(tile); });
          }
        }
      }
      if (last && first + blocks == count) output.end(i, rows, c);
    }
  }
}

#else
constexpr int kLargestByte = 0;
constexpr auto round_row = nullptr;
#endif

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
