// AVX512_BF16 in addition to AVX-512: products of bf16 pairs. The instruction treats denormals as zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/vec/avx512.h"
#include "pissa/cpu/vec/bf16.h"

namespace pissa::cpu::PISSA_ISA {

struct Pairs {
  static constexpr int kMostBlocks = 4;
  // vpermw uses five bits of a lane, vpermi2w six: 16 bf16 twice, those of two blocks, or of four.
  template <int blocks>
  struct Table {
    __m512i levels[blocks == 4 ? 2 : 1];
  };

  static PISSA_INLINE Vec::Reg mac(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static PISSA_INLINE void store(Half* to, Vec::Reg2 values) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values.b, values.a)));
  }
  static PISSA_INLINE bool has_denormals(Vec::Reg2 values) {
    constexpr int kDenormal = 0x20;
    return (_mm512_fpclass_ps_mask(values.a, kDenormal) | _mm512_fpclass_ps_mask(values.b, kDenormal)) != 0;
  }
  template <int blocks>
  static PISSA_INLINE Table<blocks> table(const float* levels, const float* scales) {
    const Vec::Reg all = Vec::load(levels);
    if constexpr (blocks == 1) {
      const __m256bh scaled = _mm512_cvtneps_pbh(Vec::mul(all, Vec::broadcast(scales[0])));
      return {{_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(scaled))}};
    } else {
      Table<blocks> scaled;
      for (int i = 0; i < blocks / 2; ++i) {
        scaled.levels[i] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(
            Vec::mul(all, Vec::broadcast(scales[2 * i + 1])), Vec::mul(all, Vec::broadcast(scales[2 * i]))));
      }
      return scaled;
    }
  }
  static PISSA_INLINE Table<1> table_from(const float* levels, float scale, float minimum) {
    const Vec::Reg shifted = Vec::fma(Vec::load(levels), Vec::broadcast(scale), Vec::broadcast(minimum));
    return {{_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(shifted)))}};
  }
  // The elements of 16 bytes: those in the low nibbles, then those in the high ones.
  static PISSA_INLINE Vec::Reg decode_halves(const Table<1>& table, const std::uint8_t* bytes) {
    const __m512i codes = _mm512_cvtepu8_epi16(both_nibbles(bytes));
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(codes, table.levels[0]));
  }
  // 32 numbers of few bits: table[(byte >> shift) % 32] for 32 bytes. A table for fewer bits repeats.
  static PISSA_INLINE Vec::Reg look_up_bits(const Half* table, const std::uint8_t* bytes, int shift) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    return _mm512_castsi512_ps(
        _mm512_permutexvar_epi16(_mm512_srli_epi16(wide, static_cast<unsigned>(shift)), _mm512_loadu_si512(table)));
  }
  static PISSA_INLINE Vec::Reg broadcast_halves(float low, float high) {
    return _mm512_mask_blend_ps(0xff00, Vec::broadcast(low), Vec::broadcast(high));
  }
  template <int blocks>
  static PISSA_INLINE Vec::Reg2 decode_split(const Table<blocks>& table, const std::uint8_t* bytes) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const Codes<blocks> codes(words, _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    return {_mm512_castsi512_ps(codes.high(table)), _mm512_castsi512_ps(codes.low(table))};
  }
  static PISSA_INLINE Vec::Reg2 interleave(Vec::Reg2 split) {
    const __m512i a = _mm512_castps_si512(split.a);
    const __m512i b = _mm512_castps_si512(split.b);
    const __m512i low = _mm512_unpacklo_epi16(a, b);  // lanes 0-3 of each 128 bits
    const __m512i high = _mm512_unpackhi_epi16(a, b);
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    return {_mm512_castsi512_ps(_mm512_permutex2var_epi64(low, first, high)),
            _mm512_castsi512_ps(_mm512_permutex2var_epi64(low, second, high))};
  }
  template <bool low_first, int blocks>
  static PISSA_INLINE void decode(const Table<blocks>& table, const std::uint8_t* bytes, Half* to) {
    // unpack works within 128 bits: arrange the bytes so that its results are in order
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const Codes<blocks> codes(_mm256_permutevar8x32_epi32(words, order), order);
    const __m512i even = low_first ? codes.low(table) : codes.high(table);
    const __m512i odd = low_first ? codes.high(table) : codes.low(table);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(even, odd));
  }

 private:
  // Codes in 16-bit lanes, and 16 times the block of each; `order`: which of the 32-bit words these bytes were.
  template <int blocks>
  struct Codes {
    __m512i codes, block;

    PISSA_INLINE Codes(__m256i words, __m256i order) : codes(_mm512_cvtepu8_epi16(words)) {
      if constexpr (blocks > 1) {
        const __m256i of_word = _mm256_and_si256(_mm256_slli_epi32(order, blocks == 2 ? 2 : 3), _mm256_set1_epi32(48));
        block = _mm512_cvtepu8_epi16(_mm256_mullo_epi32(of_word, _mm256_set1_epi32(0x01010101)));
      }
    }
    PISSA_INLINE __m512i high(const Table<blocks>& table) const {
      const __m512i index = _mm512_srli_epi16(codes, 4);
      if constexpr (blocks == 1) return look_up(table, index);
      else return look_up(table, _mm512_or_si512(index, block));
    }
    PISSA_INLINE __m512i low(const Table<blocks>& table) const {
      if constexpr (blocks == 1) return look_up(table, codes);
      else return look_up(table, _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi16(15)), block));
    }
    static PISSA_INLINE __m512i look_up(const Table<blocks>& table, __m512i index) {
      if constexpr (blocks == 4) return _mm512_permutex2var_epi16(table.levels[0], index, table.levels[1]);
      else return _mm512_permutexvar_epi16(index, table.levels[0]);
    }
  };
};

}  // namespace pissa::cpu::PISSA_ISA
