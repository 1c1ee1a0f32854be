// AVX512_BF16 beside AVX-512: products of bf16 pairs. The instruction takes denormals for zero.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/vec/avx512.h"
#include "pissa/cpu/vec/bf16.h"

namespace pissa::cpu::PISSA_ISA {

struct Pairs {
  struct Table {
    __m512i levels;  // 16 bf16, twice: vpermw looks at five bits of a lane
  };

  static PISSA_INLINE Vec::Reg mac(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static PISSA_INLINE Table table(const float* levels, float scale) {
    const __m256bh scaled = _mm512_cvtneps_pbh(Vec::mul(Vec::load(levels), Vec::broadcast(scale)));
    return {_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(scaled))};
  }
  static PISSA_INLINE Vec::Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table.levels)),
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(codes, table.levels))};
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
  static PISSA_INLINE void decode(const Table& table, const std::uint8_t* bytes, Half* to) {
    // unpack works within 128 bits: deal the bytes out so that its results are in order
    const __m256i order = _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0);
    const __m256i dealt =
        _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)), order);
    const __m512i codes = _mm512_cvtepu8_epi16(dealt);
    const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table.levels);
    const __m512i odd = _mm512_permutexvar_epi16(codes, table.levels);
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(even, odd));
  }
};

}  // namespace pissa::cpu::PISSA_ISA
