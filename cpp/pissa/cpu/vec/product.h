// How the 32-bit words of a GEMM's panels multiply: F32, with one f32 a word, everywhere; Bf16, with a pair of bf16 a
// word, if the instruction set has the dot product of pairs (PISSA_HAS_BF16); Bytes, with four integers of 8 bits a
// word, if it has theirs (PISSA_HAS_BYTES).
#pragma once

#include <cstdint>

#include "pissa/cpu/vec/bf16.h"
#include "pissa/cpu/vec/vec.h"

namespace pissa::cpu::PISSA_ISA {

// For products that the micro-kernel accumulates in vectors.
struct NoTiles {
  static constexpr bool kMultiply = false;
  static constexpr int kRows = Vec::kRows;
  static constexpr int kDepth = 1;
  static PISSA_INLINE void arrange(std::int64_t, int, std::int64_t, std::int64_t, float*) {}
};
#if !PISSA_HAS_TILES
using Tiles = NoTiles;
#endif

// A word is one f32.
struct F32 {
  using Element = float;
  using Sum = Vec::Reg;
  using Tiles = NoTiles;
  static constexpr bool kByLane = Vec::kByLane;
  static constexpr int kPerWord = 1;
  static constexpr int kMostBlocks = Vec::kMostBlocks;
  static constexpr int kDecodeBytes = Vec::kWidth;  // read by one decode, which produces twice as many elements

  static PISSA_INLINE Vec::Reg mac(Vec::Reg a, Vec::Reg b, Vec::Reg c) { return Vec::fma(a, b, c); }
  template <int lane, class V = Vec>  // a template of V: not every Vec has fma_lane
  static PISSA_INLINE Vec::Reg mac_lane(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return V::template fma_lane<lane>(a, b, c);
  }
  static PISSA_INLINE float round(float value) { return value; }
  static PISSA_INLINE void store(float* to, Vec::Reg2 values) {
    Vec::store(to, values.a);
    Vec::store(to + Vec::kWidth, values.b);
  }
  static PISSA_INLINE float exact(std::int8_t value) { return value; }
  static PISSA_INLINE float widen(float element) { return element; }
  template <int blocks>
  static PISSA_INLINE auto table(const float* levels, const float* scales) {
    return Vec::template table<blocks>(levels, scales);
  }
  static PISSA_INLINE auto table_from(const float* levels, float scale, float minimum) {
    return Vec::table_from(levels, scale, minimum);
  }
  template <class Table>
  static PISSA_INLINE Vec::Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    return Vec::decode_split(table, bytes);
  }
  template <bool low_first, class Table>
  static PISSA_INLINE void decode(const Table& table, const std::uint8_t* bytes, float* to) {
    const Vec::Reg2 split = Vec::decode_split(table, bytes);
    store(to, Vec::interleave(low_first ? Vec::Reg2{split.b, split.a} : split));
  }
};

#if PISSA_HAS_BF16

// A word is a pair of bf16, with the element of the lower index in the lower half. Products are exact, sums are f32.
// Pairs is the instruction set's part:
// - mac: c + the two products of every lane; if Vec::kByLane, also mac_lane, with one lane of a for all of b
// - kMostBlocks, table and table_from: as in Vec, rounded once, so that a dequantisation to bf16 gives the same
// - decode_split: the elements of kDecodeBytes bytes, those in the high nibbles and those in the low ones, in 16-bit
//   lanes; interleave: 32-bit lanes of pairs from 16-bit lanes of each; decode<low_first>: the elements in order
// - decode_halves, if a register has the elements of more than 16 bytes' nibbles: those of 16 bytes, the low ones first
// - look_up_bits and broadcast_halves, if a register has 32 elements: numbers of up to five bits of 32 bytes; and two
//   factors, one for the first 16 elements and one for the others
// - store: two registers of f32, rounded
struct Bf16 : Pairs {
  using Element = Half;
  using Sum = Vec::Reg;
  using Tiles = PISSA_ISA::Tiles;
  static constexpr bool kByLane = Vec::kByLane;
  static constexpr int kPerWord = 2;
  static constexpr int kDecodeBytes = 2 * Vec::kWidth;

  static PISSA_INLINE Half round(float value) { return round_to_bf16(value); }
  static PISSA_INLINE Half exact(std::int8_t value) { return exact_bf16(value); }
  static PISSA_INLINE float widen(Half element) { return widen_bf16(element); }
};

#endif

#if PISSA_HAS_BYTES

// A word is four bytes, with the element of the lowest index in the lowest. Products and sums are exact, in int32.
// Quads is the instruction set's part:
// - mac: c + the four products of every lane; a's bytes are signed, up to 127; b's, which are those of a weight, are up
//   to kLargest and have kOffset added to them
// - Sum: lanes of int32. GCC 12 keeps sums in memory, too, and stores each of them in every step, if they are Vec::Reg
//   and cast: 2.3 times as long. broadcast_int, to_float: of such lanes
// - Table, Codes, table, look_up: bytes, with kOffset, of 32 codes of four bits; codes_in_turn, codes_in_halves and
//   codes_at: those codes from the three orders in which formats store them; look_up_four: of four rows, interleaved
struct Bytes : Quads {
  static constexpr bool kByLane = false;
  static constexpr int kPerWord = 4;
};

#endif

}  // namespace pissa::cpu::PISSA_ISA
