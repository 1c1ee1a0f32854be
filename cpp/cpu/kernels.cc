// The CPU kernels: decoding, packing, the GEMM's block, NF4 quantisation, the Gram matrix. Compiled once per
// instruction set, with PISSA_ISA naming it. Nothing here may be shared between those builds: no standard library
// beyond <cstdint>, everything in an unnamed namespace or inlined by force.
#include "kernels.h"

#include "pissa/nf4.h"
#include "vec.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;
constexpr int kTileRows = Vec::kRows;
constexpr int kTileCols = 2 * kWidth;
static_assert(kMc % kTileRows == 0 && kNc % kTileCols == 0 && kTileRows <= kMaxTileRows);

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// ---- Decoding and encoding rows ------------------------------------------------------------------------------------

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
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(from[i]) << 16;
    __builtin_memcpy(to + i, &bits, sizeof bits);
  }
}

void encode_bf16(const float* from, std::int64_t count, std::uint16_t* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, from + i, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to[i] = static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
  }
}

float nf4_absmax(const Nf4Scales& scales, std::int64_t block) {
  if (scales.absmax) return scales.absmax[block];
  return kDynamicMap[scales.absmax8[block]] * scales.nested_absmax[block / kNestedBlocksize] + *scales.offset;
}

// Elements [first, first + count) of the flattened matrix; both ends may lie inside a block or a byte.
void decode_nf4(const Matrix& matrix, std::int64_t first, std::int64_t count, float* to) {
  const auto* codes = static_cast<const std::uint8_t*>(matrix.data);
  const std::int64_t blocksize = matrix.scales.blocksize;
  const std::int64_t end = first + count;
  const auto code = [&](std::int64_t i) { return i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15; };
  std::int64_t i = first;
  while (i < end) {
    const std::int64_t block = i / blocksize;
    const std::int64_t block_end = smaller((block + 1) * blocksize, end);
    const float absmax = nf4_absmax(matrix.scales, block);
    if (i % 2 != 0) *to++ = kNf4Levels[code(i++)] * absmax;
    const Vec::Table table = Vec::table(kNf4Levels, absmax);
    for (; i + 2 * kWidth <= block_end; i += 2 * kWidth, to += 2 * kWidth) Vec::decode(table, codes + i / 2, to);
    for (; i < block_end; ++i) *to++ = kNf4Levels[code(i)] * absmax;
  }
}

void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count, float* out) {
  const std::int64_t offset = row * matrix.ld + col;
  switch (matrix.codec) {
    case Codec::f32:
      __builtin_memcpy(out, static_cast<const float*>(matrix.data) + offset, count * sizeof(float));
      break;
    case Codec::bf16:
      decode_bf16(static_cast<const std::uint16_t*>(matrix.data) + offset, count, out);
      break;
    case Codec::f16:
      decode_f16(static_cast<const std::uint16_t*>(matrix.data) + offset, count, out);
      break;
    case Codec::nf4:
      decode_nf4(matrix, row * matrix.cols + col, count, out);
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

// ---- GEMM ----------------------------------------------------------------------------------------------------------

// Packs op(matrix) into strips of `width`: strip[k][lane], zero beyond `count` lanes. `lead` indexes what becomes the
// lanes (rows of A, columns of B), k the inner dimension; by_rows says that the lead index runs over the matrix's rows.
template <int width>
void pack(const Matrix& matrix, bool by_rows, std::int64_t lead, std::int64_t count, std::int64_t k0,
          std::int64_t depth, float scale, float* panel, float* scratch) {
  if (by_rows) {  // rows run along k: decode a strip's rows, then transpose
    for (std::int64_t strip = 0; strip < count; strip += width, panel += width * depth) {
      const std::int64_t lanes = smaller(width, count - strip);
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        decode(matrix, lead + strip + lane, k0, depth, scratch + lane * kKc);
      }
      for (std::int64_t lane = lanes; lane < width; ++lane)
        __builtin_memset(scratch + lane * kKc, 0, depth * sizeof(float));
      for (std::int64_t k = 0; k < depth; ++k) {
        for (int lane = 0; lane < width; ++lane) panel[k * width + lane] = scale * scratch[lane * kKc + k];
      }
    }
    return;
  }
  const std::int64_t strips = ceil_div(count, width);
  for (std::int64_t k = 0; k < depth; ++k) {  // rows run along the lanes: decode one and deal it out
    decode(matrix, k0 + k, lead, count, scratch);
    for (std::int64_t i = count; i < strips * width; ++i) scratch[i] = 0.0f;
    for (std::int64_t strip = 0; strip < strips; ++strip) {
      float* to = panel + (strip * depth + k) * width;
      for (int lane = 0; lane < width; ++lane) to[lane] = scale * scratch[strip * width + lane];
    }
  }
}

// c[rows, kTileCols] += a_strip * b_strip, rows <= kTileRows.
template <int rows>
void micro_kernel(std::int64_t depth, const float* a, const float* b, float* c) {
  Vec::Reg sum[rows][2];
  for (int i = 0; i < rows; ++i) {
    sum[i][0] = Vec::load(c + i * kNc);
    sum[i][1] = Vec::load(c + i * kNc + kWidth);
  }
  for (std::int64_t k = 0; k < depth; ++k, a += kTileRows, b += kTileCols) {
    const Vec::Reg b0 = Vec::load(b);
    const Vec::Reg b1 = Vec::load(b + kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const Vec::Reg a_i = Vec::broadcast(a[i]);
      sum[i][0] = Vec::fma(a_i, b0, sum[i][0]);
      sum[i][1] = Vec::fma(a_i, b1, sum[i][1]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    Vec::store(c + i * kNc, sum[i][0]);
    Vec::store(c + i * kNc + kWidth, sum[i][1]);
  }
}

// The kernel for the number of rows left in a tile.
template <int rows = kTileRows>
void multiply_tile(std::int64_t wanted, std::int64_t depth, const float* a, const float* b, float* c) {
  if (wanted == rows) return micro_kernel<rows>(depth, a, b, c);
  if constexpr (rows > 1) multiply_tile<rows - 1>(wanted, depth, a, b, c);
}

void gemm_block(const GemmProblem& problem, const Block& block, const Panels& panels) {
  const std::int64_t padded_cols = ceil_div(block.cols, kTileCols) * kTileCols;
  for (std::int64_t i = 0; i < block.rows; ++i) {
    float* c = panels.c + i * kNc;
    __builtin_memset(c, 0, padded_cols * sizeof(float));
    if (problem.addend) decode(problem.addend, block.row + i, block.col, block.cols, c);
  }
  for (const Term* term = problem.terms; term != problem.terms + problem.term_count; ++term) {
    const std::int64_t inner = term->inner();
    for (std::int64_t k0 = 0; k0 < inner; k0 += kKc) {
      const std::int64_t depth = smaller(kKc, inner - k0);
      pack<kTileCols>(term->b, term->op_b == Op::t, block.col, block.cols, k0, depth, 1.0f, panels.b, panels.row);
      pack<kTileRows>(term->a, term->op_a == Op::n, block.row, block.rows, k0, depth, term->scale, panels.a,
                      panels.row);
      for (std::int64_t j = 0; j < block.cols; j += kTileCols) {
        for (std::int64_t i = 0; i < block.rows; i += kTileRows) {
          multiply_tile(smaller(kTileRows, block.rows - i), depth, panels.a + i * depth, panels.b + j * depth,
                        panels.c + i * kNc + j);
        }
      }
    }
  }
  if (problem.bias) decode(problem.bias, 0, block.col, block.cols, panels.row);
  for (std::int64_t i = 0; i < block.rows; ++i) {
    float* c = panels.c + i * kNc;
    if (problem.bias) {
      for (std::int64_t j = 0; j < block.cols; ++j) c[j] += panels.row[j];
    }
    const MutableMatrix& out = problem.out;
    const std::int64_t offset = (block.row + i) * out.ld + block.col;
    encode(c, block.cols, out.codec, static_cast<char*>(out.data) + offset * element_size(out.codec));
  }
}

// ---- Reductions ----------------------------------------------------------------------------------------------------

float max_abs(const float* values, std::int64_t count) {
  Vec::Reg largest = Vec::zero();
  Vec::Reg zeros = Vec::zero();  // stays 0, or becomes NaN through Inf * 0 or NaN * 0
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec::Reg value = Vec::load(values + i);
    largest = Vec::max(largest, Vec::abs(value));
    zeros = Vec::fma(value, Vec::zero(), zeros);
  }
  float lanes[kWidth];
  float zero_lanes[kWidth];
  Vec::store(lanes, largest);
  Vec::store(zero_lanes, zeros);
  float result = 0.0f;
  float zero = 0.0f;
  for (int lane = 0; lane < kWidth; ++lane) {
    result = lanes[lane] > result ? lanes[lane] : result;
    zero += zero_lanes[lane];
  }
  for (; i < count; ++i) {
    result = __builtin_fabsf(values[i]) > result ? __builtin_fabsf(values[i]) : result;
    zero += values[i] * 0.0f;
  }
  return result + zero;
}

// <row i, row j> for a tile of rows x columns of the Gram matrix, one range of columns of the data.
template <int rows, int cols>
void gram_tile(const float* a, const float* b, std::int64_t ld, std::int64_t count, double* gram,
               std::int64_t ld_gram) {
  constexpr int kWidth64 = kWidth / 2;
  Vec::Reg64 sum[rows][cols];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero64();
  }
  std::int64_t k = 0;
  for (; k + kWidth64 <= count; k += kWidth64) {
    Vec::Reg64 b_k[cols];
    for (int j = 0; j < cols; ++j) b_k[j] = Vec::load64(b + j * ld + k);
    for (int i = 0; i < rows; ++i) {
      const Vec::Reg64 a_k = Vec::load64(a + i * ld + k);
      for (int j = 0; j < cols; ++j) sum[i][j] = Vec::fma64(a_k, b_k[j], sum[i][j]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      double lanes[kWidth64];
      Vec::store64(lanes, sum[i][j]);
      double total = 0.0;
      for (int lane = 0; lane < kWidth64; ++lane) total += lanes[lane];
      for (std::int64_t tail = k; tail < count; ++tail) total += double{a[i * ld + tail]} * double{b[j * ld + tail]};
      gram[i * ld_gram + j] += total;
    }
  }
}

void gram(const float* rows, std::int64_t cols, std::int64_t ld, std::int64_t first, std::int64_t last, double* gram,
          std::int64_t ld_gram) {
  constexpr std::int64_t kChunk = 2048;  // 8 rows of it stay in L1 together with the accumulators' partners
  for (std::int64_t i = first; i < last; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) gram[i * ld_gram + j] = 0.0;
  }
  for (std::int64_t k = 0; k < cols; k += kChunk) {
    const std::int64_t count = smaller(kChunk, cols - k);
    for (std::int64_t i = first; i < last; ++i) {
      const float* a = rows + i * ld + k;
      std::int64_t j = 0;
      for (; j + 4 <= i + 1; j += 4) gram_tile<1, 4>(a, rows + j * ld + k, ld, count, gram + i * ld_gram + j, ld_gram);
      for (; j <= i; ++j) gram_tile<1, 1>(a, rows + j * ld + k, ld, count, gram + i * ld_gram + j, ld_gram);
    }
  }
}

// ---- NF4 -----------------------------------------------------------------------------------------------------------

// Codes of one block whose elements, divided by absmax, are given a vector at a time.
void nf4_codes(const float* values, std::int64_t count, float factor, bool divide, float* codes) {
  const Vec::Reg one = Vec::broadcast(1.0f);
  const Vec::Reg minus_one = Vec::broadcast(-1.0f);
  std::int64_t i = 0;
  for (; !divide && i + kWidth <= count; i += kWidth) {
    const Vec::Reg scaled = Vec::max(Vec::min(Vec::mul(Vec::load(values + i), Vec::broadcast(factor)), one), minus_one);
    Vec::Reg code = Vec::zero();
    for (int t = 0; t < 15; ++t) code = Vec::count_above(scaled, Vec::broadcast(kNf4Thresholds.value[t]), code);
    Vec::store(codes + i, code);
  }
  for (; i < count; ++i) codes[i] = nf4_code(divide ? values[i] / factor : values[i] * factor);
}

void nf4_quantize(const float* values, std::int64_t count, std::int64_t blocksize, std::uint8_t* codes, float* absmax) {
  constexpr std::int64_t kMaxBlocksize = 4096;
  float block_codes[kMaxBlocksize + 1];
  for (std::int64_t first = 0; first < count; first += blocksize) {
    const std::int64_t length = smaller(blocksize, count - first);
    const float largest = max_abs(values + first, length);
    const float divisor = largest > kSmallestAbsmax ? largest : kSmallestAbsmax;
    // bitsandbytes multiplies whole blocks by 1 / absmax and divides the short last one; the codes can differ.
    const bool whole = length == blocksize;
    *absmax++ = whole ? largest : divisor;
    nf4_codes(values + first, length, whole ? 1.0f / divisor : divisor, !whole, block_codes);
    block_codes[length] = nf4_code(0.0f);  // the partner of an odd last element
    for (std::int64_t i = 0; i < length; i += 2) {
      *codes++ =
          static_cast<std::uint8_t>((static_cast<int>(block_codes[i]) << 4) | static_cast<int>(block_codes[i + 1]));
    }
  }
}

}  // namespace

#define PISSA_STRINGIFY(name) #name
#define PISSA_NAME(name) PISSA_STRINGIFY(name)

const Kernels& kernels() {
  static constexpr Kernels table = {PISSA_NAME(PISSA_ISA), gemm_block, decode, encode, max_abs, nf4_quantize, gram};
  return table;
}

}  // namespace pissa::cpu::PISSA_ISA
