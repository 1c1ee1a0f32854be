// Blocks of GGUF files. Included only by kernels.cc.
//
// Codes of four bits are looked up in tables, as in four_bits.h: low nibbles are the elements of a run, high nibbles
// those of the next. Other codes are first made bytes.
#pragma once

#include <type_traits>

#include "pissa/core/gguf.h"
#include "pissa/cpu/kernels/any_format.h"
#include "pissa/cpu/kernels/int8.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

template <Format format>
struct GgufCodes {
  using Layout = Gguf<format>;
  static constexpr Format kFormat = format;
  static constexpr int kElements = static_cast<int>(info(format).blocks.usual);
  static constexpr int kBytes = info(format).block_bytes;
  static constexpr int kRun = Layout::kRun;
  static constexpr int kGroup = Layout::kGroup;
  static constexpr int kGroups = kElements / kGroup;
  static constexpr int kPair = 2 * kRun;  // elements whose codes of four bits share bytes
  static constexpr bool kHasMinimum = Layout::kMinimum >= 0;
  static constexpr bool kIsNibbles = info(format).bits == 4;

  static PISSA_INLINE const std::uint8_t* block_at(const Matrix& matrix, std::int64_t row, std::int64_t col) {
    const std::int64_t blocks = row * (matrix.cols / kElements) + col / kElements;
    return static_cast<const std::uint8_t*>(matrix.data) + blocks * kBytes;
  }

  // The scales and minima of a block, one after the other.
  struct Groups {
    float scales[kHasMinimum ? 2 * kGroups : kGroups];

    template <class V = Vec>  // a template of V: not every Vec has store_six_bits, or store_five_bits below
    PISSA_INLINE void read(const std::uint8_t* block) {
      if constexpr (format == Format::mxfp4_gguf) {
        scales[0] = half_e8m0(block[0]);
      } else if constexpr (Layout::kSixBits && requires { V::store_six_bits(scales, block); }) {
        V::store_six_bits(scales, block);
      } else if constexpr (format == Format::q6_k) {
        const Vec::Reg scale = Vec::broadcast(Vec::load_half(block + Layout::kScale));
        const auto* codes = reinterpret_cast<const std::int8_t*>(block + Layout::kScaleCodes);
        for (int i = 0; i < kGroups; i += kWidth) Vec::store(scales + i, Vec::mul(Vec::load_i8(codes + i), scale));
      } else {
        const float scale = Vec::load_half(block + Layout::kScale);
        for (int i = 0; i < kGroups; ++i) scales[i] = scale * static_cast<float>(Layout::scale_code(block, i));
        if constexpr (kHasMinimum) {
          const float half = Vec::load_half(block + Layout::kMinimum);
          for (int i = 0; i < kGroups; ++i) {
            if constexpr (Layout::kMinimumHasCodes) {
              scales[kGroups + i] = -half * static_cast<float>(Layout::minimum_code(block, i));
            } else {
              scales[kGroups + i] = half;
            }
          }
        }
      }
    }
    PISSA_INLINE float minimum(int group) const { return scales[kGroups + group]; }
    PISSA_INLINE float element(float code, int i) const {
      const float product = scales[i / kGroup] * code;
      if constexpr (kHasMinimum) return product + minimum(i / kGroup);
      else return product;
    }
  };

  // Both ends may be inside a block or a run. Each element is rounded once to the product's elements.
  template <class Product>
  static void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                     typename Product::Element* to) {
    const std::uint8_t* block = block_at(matrix, row, col);
    int i = static_cast<int>(col % kElements);
    for (; count > 0; block += kBytes, i = 0) {
      const int end = static_cast<int>(smaller(kElements, i + count));
      Groups groups;
      groups.read(block);
      if constexpr (kIsNibbles) decode_nibbles<Product>(block, groups, i, end, to);
      else decode_bytes<Product>(block, groups, i, end, to);
      count -= end - i;
      to += end - i;
    }
  }

  template <class Product>
  static bool dots(const Term& term, std::int64_t rows) {
    return rows <= kCodeDotRows && term.op_a == Op::n && term.op_b == Op::t;
  }
  template <class Product>
  static void dot(const Term& term, const Block& block, const Panels& panels, bool accumulate);

  // ---- Four bits

  struct Levels {
    float value[16];
  };
  static constexpr Levels level_values() {
    Levels result{};
    for (int code = 0; code < 16; ++code) {
      if constexpr (Layout::kHasLevels) result.value[code] = Layout::kLevels[code];
      else result.value[code] = static_cast<float>(code - Layout::kBias);
    }
    return result;
  }
  static constexpr Levels kValues = level_values();

  // For bytes.h, as PackedPairs has them.
  static constexpr Ends kEnds = ends_of(kValues.value);
  static PISSA_INLINE const float* levels() { return kValues.value; }
  static PISSA_INLINE bool has_runs(const Matrix&, std::int64_t col, std::int64_t count)
    requires kIsNibbles
  {
    return (col | count) % 32 == 0;
  }
  static PISSA_INLINE void read_runs(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t runs,
                                     float* scales, float* minima) {
    static_assert(kGroup == 32);
    const std::uint8_t* block = block_at(matrix, row, col);
    std::int64_t group = col % kElements / kGroup;
    for (std::int64_t i = 0; i < runs; block += kBytes, group = 0) {
      Groups groups;
      groups.read(block);
      for (; group < kGroups && i < runs; ++group, ++i) {
        scales[i] = groups.scales[group];
        if constexpr (kHasMinimum) minima[i] = groups.minimum(static_cast<int>(group));
      }
    }
  }
  template <class Quads>
  static PISSA_INLINE auto run_at(const Matrix& matrix, std::int64_t row, std::int64_t col) {
    const std::uint8_t* block = block_at(matrix, row, col);
    const BlockBits bits = Layout::low(static_cast<int>(col % kElements / kRun));
    if constexpr (kRun == 16) return Quads::codes_in_halves(block + bits.byte);
    else return Quads::codes_at(block + bits.byte, bits.shift);
  }

  // The elements of the levels in a group.
  template <class Product>
  static PISSA_INLINE auto table_of(const Groups& groups, int group) {
    if constexpr (kHasMinimum) return Product::table_from(kValues.value, groups.scales[group], groups.minimum(group));
    else return Product::template table<1>(kValues.value, groups.scales + group);
  }

  // Calls f(i, register) for the elements from i on of the kPair elements of kRun bytes, each looked up in the table of
  // its run.
  template <class Product, class Table, class F>
  static PISSA_INLINE void look_up_pair(const Table& low, const Table& high, const std::uint8_t* bytes, F f) {
    if constexpr (Product::kDecodeBytes > kRun) {
      f(0, Product::decode_halves(low, bytes));
    } else {
      for (int i = 0; i < kRun; i += Product::kDecodeBytes) {
        f(i, Product::decode_split(low, bytes + i).b);
        f(kRun + i, Product::decode_split(high, bytes + i).a);
      }
    }
  }

  template <class Product>
  static PISSA_INLINE void decode_nibbles(const std::uint8_t* block, const Groups& groups, int i, int end,
                                          typename Product::Element* to) {
    while (i < end) {
      if (i % kPair == 0 && i + kPair <= end) {
        const auto low = table_of<Product>(groups, i / kGroup), high = table_of<Product>(groups, (i + kRun) / kGroup);
        look_up_pair<Product>(low, high, block + Layout::low(i / kRun).byte, [&](int at, Vec::Reg elements) {
          Vec::store(reinterpret_cast<float*>(to + at), elements);
        });
        i += kPair, to += kPair;
      } else {
        *to++ = Product::round(groups.element(static_cast<float>(gguf_code<format>(block, i)), i));
        ++i;
      }
    }
  }

  // ---- Other codes

  // Whether a code is a sum of bits of one or two bytes, each looked up in a table of the product.
  template <class Product>
  static constexpr bool looks_up_bits() {
    return requires { Product::look_up_bits(nullptr, nullptr, 0); } && !kIsNibbles && kRun == 32;
  }
  struct BitTables {
    std::uint16_t low[32], high[32];
  };
  static constexpr BitTables bit_tables() {
    constexpr bool kSigned = info(format).bits == 8;
    BitTables tables{};
    for (int i = 0; i < 32; ++i) {
      const int low = i & low_bits(0).mask, high = i & high_bits(0).mask;
      const int shifted = kSigned ? (high < 8 ? high : high - 16) * 16 : high << Layout::kHighBits;
      tables.low[i] = exact_bf16(low);
      tables.high[i] = exact_bf16(shifted - Layout::kBias);
    }
    return tables;
  }
  static constexpr BlockBits low_bits(int run) {
    const BlockBits bits = Layout::low(run);
    return info(format).bits == 8 ? BlockBits{bits.byte, 0, 15} : bits;
  }
  static constexpr BlockBits high_bits(int run) {
    return info(format).bits == 8 ? BlockBits{Layout::low(run).byte, 4, 15} : Layout::high(run);
  }
  static constexpr bool kHasHighBits = info(format).bits == 8 || Layout::kHighBits > 0;

  // The bytes of a run, 32 of them, for GCC and clang to map to the instruction set's registers.
  using Words = std::uint64_t __attribute__((vector_size(32)));
  using Bytes = std::int8_t __attribute__((vector_size(32)));

  // The codes of a block, as the core's gguf_code has them, in runs [first, end): in `codes`, or where they are.
  template <class V = Vec>
  static PISSA_INLINE const std::int8_t* unpack(const std::uint8_t* block, int first, int end,
                                                std::int8_t (&codes)[kElements]) {
    if constexpr (info(format).bits == 8) {
      return reinterpret_cast<const std::int8_t*>(block + Layout::low(0).byte);
    } else if constexpr (Layout::kFifthBits > 0) {
      if constexpr (requires { V::store_five_bits(codes, block, 0u, 0); }) {
        std::uint32_t fifth;
        __builtin_memcpy(&fifth, block + Layout::kFifthBits, sizeof fifth);
        V::store_five_bits(codes, block + Layout::low(0).byte, fifth, Layout::kBias);
      } else {
        for (int i = 0; i < kElements; ++i) codes[i] = static_cast<std::int8_t>(gguf_code<format>(block, i));
      }
    } else {
      static_assert(kRun == sizeof(Words));
      const auto read = [&](BlockBits of, Words& words) {
        __builtin_memcpy(&words, block + of.byte, sizeof words);
        words = (words >> of.shift) & (0x0101010101010101u * static_cast<std::uint64_t>(of.mask));
      };
#pragma GCC unroll 8
      for (int run = first; run < end; ++run) {
        Words code, high;
        read(Layout::low(run), code);
        if constexpr (Layout::kHighBits > 0) {
          read(Layout::high(run), high);
          code |= high << Layout::kHighBits;
        }
        const Bytes numbers = reinterpret_cast<Bytes>(code) - static_cast<std::int8_t>(Layout::kBias);
        __builtin_memcpy(codes + run * kRun, &numbers, sizeof numbers);
      }
    }
    return codes;
  }

  // Elements [i, i + kWidth), which are of one group.
  static PISSA_INLINE Vec::Reg elements(const std::int8_t* codes, const Groups& groups, int i) {
    const Vec::Reg code = Vec::load_i8(codes + i), scale = Vec::broadcast(groups.scales[i / kGroup]);
    if constexpr (kHasMinimum) return Vec::fma(code, scale, Vec::broadcast(groups.minimum(i / kGroup)));
    else return Vec::mul(code, scale);
  }

  template <class Product>
  static PISSA_INLINE void decode_bytes(const std::uint8_t* block, const Groups& groups, int i, int end,
                                        typename Product::Element* to) {
    constexpr int kStep = 2 * kWidth;
    alignas(64) std::int8_t unpacked[kElements];
    const std::int8_t* codes = unpack(block, i / kRun, (end - 1) / kRun + 1, unpacked);
    while (i < end) {
      if (i % kStep == 0 && i + kStep <= end) {
        Product::store(to, {elements(codes, groups, i), elements(codes, groups, i + kWidth)});
        i += kStep, to += kStep;
      } else {
        *to++ = Product::round(groups.element(codes[i], i));
        ++i;
      }
    }
  }
};

// ---- x W^T for one to four rows of x -----------------------------------------------------------------------------
// Dot products of the codes' numbers: a group's scale multiplies its sum, and its minimum the sum of x over the group.
// Levels of four bits are multiplied as the product's elements; so are other codes, if they can be looked up, or they
// are multiplied in f32.

constexpr int kGgufCols = Vec::kRegisters == 32 ? 4 : 2;

// Rows of x, `kInt8Run` elements apart. For each block, the sums of x over its groups are laid out as Groups has the
// minima, with zeros in place of the scales.
template <class Codes, class Product>
struct GgufRows {
  const typename Product::Element* x;
  const float* sums;

  static constexpr std::int64_t kSums = kInt8Run / Codes::kElements * 2 * Codes::kGroups;  // of a row

  PISSA_INLINE GgufRows from(std::int64_t k) const { return {x + k, sums + k / Codes::kElements * 2 * Codes::kGroups}; }
};

// The part of sums that minima make.
template <class Codes, int rows, int cols>
struct LeastSums {
  static constexpr int kFrom = Codes::kGroups % kWidth == 0 ? Codes::kGroups : 0;
  Vec::Reg lanes[rows][cols];
  float one[rows][cols] = {};  // of blocks that are a group

  PISSA_INLINE LeastSums() {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) lanes[i][j] = Vec::zero();
    }
  }
  // The minima of block j, each times the sum of x[i] over its group.
  template <class Product>
  PISSA_INLINE void add(const typename Codes::Groups (&groups)[cols], const GgufRows<Codes, Product>& x) {
    if constexpr (!Codes::kHasMinimum) return;
    for (int i = 0; i < rows; ++i) {
      const float* sums = x.sums + i * x.kSums;
      for (int j = 0; j < cols; ++j) {
        if constexpr (Codes::kGroups == 1) {
          one[i][j] += groups[j].minimum(0) * sums[1];
        } else {
          for (int k = kFrom; k < 2 * Codes::kGroups; k += kWidth) {
            lanes[i][j] = Vec::fma(Vec::load(groups[j].scales + k), Vec::load(sums + k), lanes[i][j]);
          }
        }
      }
    }
  }
  PISSA_INLINE float total(int i, int j) const {
    return Codes::kGroups == 1 ? one[i][j] : Vec::reduce_add(lanes[i][j]);
  }
};

// sum[i][j], with least, += x[i] . block j.
template <class Codes, class Product, int rows, int cols>
PISSA_INLINE void add_nibbles(const std::uint8_t* const (&blocks)[cols], const GgufRows<Codes, Product>& x,
                              Vec::Reg (&sum)[rows][cols], LeastSums<Codes, rows, cols>& least) {
  constexpr int kRegisters = Codes::kPair / Product::kDecodeBytes;
  constexpr int kPairGroups = Codes::kPair / Codes::kGroup;
  constexpr float kOne = 1.0f;
  const auto levels = Product::template table<1>(Codes::kValues.value, &kOne);
  typename Codes::Groups groups[cols];
  for (int j = 0; j < cols; ++j) groups[j].read(blocks[j]);
  for (int pair = 0; pair < Codes::kElements; pair += Codes::kPair) {
    Vec::Reg values[cols][kRegisters];
    for (int j = 0; j < cols; ++j) {
      Codes::template look_up_pair<Product>(
          levels, levels, blocks[j] + Codes::Layout::low(pair / Codes::kRun).byte,
          [&](int at, Vec::Reg elements) { values[j][at / Product::kDecodeBytes] = elements; });
    }
    for (int i = 0; i < rows; ++i) {
      for (int group = 0; group < kPairGroups; ++group) {
        constexpr int kOfGroup = kRegisters / kPairGroups;
        Vec::Reg x_k[kOfGroup];
        for (int n = 0; n < kOfGroup; ++n) {
          const auto* from = x.x + i * kInt8Run + pair + (group * kOfGroup + n) * Product::kDecodeBytes;
          x_k[n] = Vec::load(reinterpret_cast<const float*>(from));
        }
        for (int j = 0; j < cols; ++j) {
          Vec::Reg part = Vec::zero();
          for (int n = 0; n < kOfGroup; ++n) part = Product::mac(values[j][group * kOfGroup + n], x_k[n], part);
          sum[i][j] = Vec::fma(part, Vec::broadcast(groups[j].scales[pair / Codes::kGroup + group]), sum[i][j]);
        }
      }
    }
  }
  least.add(groups, x);
}

template <class Codes, int rows, int cols>
PISSA_INLINE void add_bytes(const std::uint8_t* const (&blocks)[cols], const GgufRows<Codes, F32>& x,
                            Vec::Reg (&sum)[rows][cols], LeastSums<Codes, rows, cols>& least) {
  alignas(64) std::int8_t unpacked[cols][Codes::kElements];
  const std::int8_t* codes[cols];
  typename Codes::Groups groups[cols];
  for (int j = 0; j < cols; ++j) {
    groups[j].read(blocks[j]);
    codes[j] = Codes::unpack(blocks[j], 0, Codes::kElements / Codes::kRun, unpacked[j]);
  }
  for (int group = 0; group < Codes::kGroups; ++group) {
    Vec::Reg part[rows][cols];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) part[i][j] = Vec::zero();
    }
    for (int k = group * Codes::kGroup; k < (group + 1) * Codes::kGroup; k += kWidth) {
      Vec::Reg values[cols];
      for (int j = 0; j < cols; ++j) values[j] = Vec::load_i8(codes[j] + k);
      for (int i = 0; i < rows; ++i) {
        const Vec::Reg x_k = Vec::load(x.x + i * kInt8Run + k);
        for (int j = 0; j < cols; ++j) part[i][j] = Vec::fma(x_k, values[j], part[i][j]);
      }
    }
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < cols; ++j) {
        sum[i][j] = Vec::fma(part[i][j], Vec::broadcast(groups[j].scales[group]), sum[i][j]);
      }
    }
  }
  least.add(groups, x);
}

template <class Codes, class Product, int rows, int cols>
PISSA_INLINE void add_bits(const std::uint8_t* const (&blocks)[cols], const GgufRows<Codes, Product>& x,
                           Vec::Reg (&sum)[rows][cols], LeastSums<Codes, rows, cols>& least) {
  static constexpr auto kTables = Codes::bit_tables();
  typename Codes::Groups groups[cols];
  for (int j = 0; j < cols; ++j) groups[j].read(blocks[j]);
#pragma GCC unroll 8
  for (int run = 0; run < Codes::kElements / Codes::kRun; ++run) {
    const BlockBits low = Codes::low_bits(run), high = Codes::high_bits(run);
    const int group = run * Codes::kRun / Codes::kGroup;
    Vec::Reg x_k[rows];
    for (int i = 0; i < rows; ++i) {
      x_k[i] = Vec::load(reinterpret_cast<const float*>(x.x + i * kInt8Run + run * Codes::kRun));
    }
    for (int j = 0; j < cols; ++j) {
      const Vec::Reg values = Product::look_up_bits(kTables.low, blocks[j] + low.byte, low.shift);
      Vec::Reg more = Vec::zero();
      if constexpr (Codes::kHasHighBits) more = Product::look_up_bits(kTables.high, blocks[j] + high.byte, high.shift);
      const float* of_run = groups[j].scales + group;
      const Vec::Reg scale =
          Codes::kGroup == 16 ? Product::broadcast_halves(of_run[0], of_run[1]) : Vec::broadcast(of_run[0]);
      for (int i = 0; i < rows; ++i) {
        Vec::Reg part = Product::mac(values, x_k[i], Vec::zero());
        if constexpr (Codes::kHasHighBits) part = Product::mac(more, x_k[i], part);
        sum[i][j] = Vec::fma(part, scale, sum[i][j]);
      }
    }
  }
  least.add(groups, x);
}

// c[i, j] = or += x[i, 0 : count] . W[j, 0 : count], where rows of W are `ld` bytes apart.
template <class Codes, class Product, int rows, int cols>
void gguf_tile(const std::uint8_t* weight, std::int64_t ld, std::int64_t count, const GgufRows<Codes, Product>& x,
               float* c, bool accumulate) {
  Vec::Reg sum[rows][cols];
  LeastSums<Codes, rows, cols> least;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) sum[i][j] = Vec::zero();
  }
  for (std::int64_t k = 0; k < count; k += Codes::kElements, weight += Codes::kBytes) {
    const std::uint8_t* blocks[cols];
    for (int j = 0; j < cols; ++j) {
      blocks[j] = weight + j * ld;
      for (int byte = 0; byte < Codes::kBytes; byte += 64) __builtin_prefetch(blocks[j] + cols * ld + byte);
    }
    if constexpr (Codes::kIsNibbles) add_nibbles<Codes, Product>(blocks, x.from(k), sum, least);
    else if constexpr (Codes::template looks_up_bits<Product>())
      add_bits<Codes, Product>(blocks, x.from(k), sum, least);
    else add_bytes<Codes>(blocks, x.from(k), sum, least);
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      float total = Vec::reduce_add(sum[i][j]);
      if constexpr (Codes::kHasMinimum) total += least.total(i, j);
      c[i * kNc + j] = accumulate ? c[i * kNc + j] + total : total;
    }
  }
}

template <class Codes, class Product, int rows = kCodeDotRows>
PISSA_INLINE void gguf_rows(std::int64_t wanted, const Matrix& weight, const Block& block, std::int64_t k0,
                            std::int64_t count, const GgufRows<Codes, Product>& x, float* c, bool accumulate) {
  if constexpr (rows > 1) {
    if (wanted < rows) return gguf_rows<Codes, Product, rows - 1>(wanted, weight, block, k0, count, x, c, accumulate);
  }
  const std::int64_t ld = code_bytes(Codes::kFormat, weight.cols);
  const std::uint8_t* first = Codes::block_at(weight, block.col, k0);
  std::int64_t j = 0;
  for (; j + kGgufCols <= block.cols; j += kGgufCols) {
    gguf_tile<Codes, Product, rows, kGgufCols>(first + j * ld, ld, count, x, c + j, accumulate);
  }
  for (; j < block.cols; ++j) gguf_tile<Codes, Product, rows, 1>(first + j * ld, ld, count, x, c + j, accumulate);
}

// c = or += the term
template <Format format>
template <class Product>
void GgufCodes<format>::dot(const Term& term, const Block& block, const Panels& panels, bool accumulate) {
  using Factor = std::conditional_t<kIsNibbles || looks_up_bits<Product>(), Product, F32>;
  using Rows = GgufRows<GgufCodes, Factor>;
  static_assert(kInt8Run % 256 == 0);
  const std::int64_t inner = term.inner();
  auto* const x = reinterpret_cast<typename Factor::Element*>(panels.b);
  float* const sums = panels.b + kCodeDotRows * kInt8Run;
  for (std::int64_t k0 = 0; k0 < inner; k0 += kInt8Run) {
    const std::int64_t count = smaller(kInt8Run, inner - k0);
    for (std::int64_t i = 0; i < block.rows; ++i) {
      decode_elements(term.a, block.row + i, k0, count, term.scale, Factor{}, x + i * kInt8Run);
      for (std::int64_t k = 0; kHasMinimum && k < count; k += kGroup) {
        float sum = 0.0f;
        for (int at = 0; at < kGroup; ++at) sum += Factor::widen(x[i * kInt8Run + k + at]);
        float* const of_block = sums + i * Rows::kSums + k / kElements * 2 * kGroups;
        of_block[k % kElements / kGroup] = 0.0f;
        of_block[kGroups + k % kElements / kGroup] = sum;
      }
    }
    gguf_rows<GgufCodes, Factor>(block.rows, term.b, block, k0, count, Rows{x, sums}, panels.c, accumulate);
    accumulate = true;
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
