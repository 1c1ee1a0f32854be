// AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/nf4.h"
#include "pissa/core/types.h"
#include "pissa/cpu/vec/gguf_x86.h"

namespace pissa::cpu::PISSA_ISA {

struct Vec {
  using Reg = __m512;
  using Reg64 = __m512d;
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kRows = 14;
  static constexpr bool kByLane = false;

  static PISSA_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static PISSA_INLINE Reg broadcast(float value) { return _mm512_set1_ps(value); }
  static PISSA_INLINE Reg load(const float* from) { return _mm512_loadu_ps(from); }
  static PISSA_INLINE void store(float* to, Reg value) { _mm512_storeu_ps(to, value); }
  static PISSA_INLINE Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static PISSA_INLINE float reduce_add(Reg a) { return _mm512_reduce_add_ps(a); }
  static PISSA_INLINE float reduce_max_bits(Reg a) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epu32(_mm512_castps_si512(a)))));
  }
  static PISSA_INLINE Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static PISSA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static PISSA_INLINE Reg max_bits(Reg a, Reg b) {
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static PISSA_INLINE Reg abs(Reg a) { return _mm512_abs_ps(a); }
  static PISSA_INLINE void store_codes(std::uint8_t* to, Reg value, const Nf4Search& search) {
    const Reg place = fma(value, broadcast(Nf4Search::kFactor), broadcast(Nf4Search::kShift));
    const __m512i cell = _mm512_cvttps_epi32(place);  // for NaN: 0, in the bits that count
    const Reg threshold = _mm512_permutex2var_ps(load(search.threshold), cell, load(search.threshold + 16));
    const __m512i base =
        _mm512_permutex2var_epi32(_mm512_loadu_si512(search.base), cell, _mm512_loadu_si512(search.base + 16));
    const __mmask16 above = _mm512_cmp_ps_mask(value, threshold, _CMP_GT_OQ);
    const __m512i code = _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
    const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8(pair));
  }
  static PISSA_INLINE Reg load_i8(const std::int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static PISSA_INLINE void store_five_bits(std::int8_t* to, const std::uint8_t* nibbles, std::uint32_t fifth,
                                           int bias) {
    store_fives(to, nibbles, _mm256_maskz_set1_epi8(fifth, 16), bias);
  }
  static PISSA_INLINE void store_six_bits(float* to, const std::uint8_t* block) {
    const __m256i minus = _mm256_set1_epi32(static_cast<int>(0x80000000u));
    const Reg halves = _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(block))));
    const Reg signs = _mm512_castsi512_ps(_mm512_inserti32x8(_mm512_setzero_si512(), minus, 1));
    const __m512i which = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const Reg factors = _mm512_xor_ps(_mm512_permutexvar_ps(which, halves), signs);
    store(to, mul(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(six_bits(block))), factors));
  }
  // Places sign, exponent and fraction as in f16: the number divided by the ratio of biases, 2^(15 - 7). Not NaN.
  static PISSA_INLINE Reg load_f8(const std::uint8_t* from) {
    const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(-0x4080)));
  }
  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static PISSA_INLINE float load_half(const void* from) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _cvtsh_ss(bits);
  }
  static PISSA_INLINE void store_f16(std::uint16_t* to, Reg value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  static PISSA_INLINE Reg64 zero64() { return _mm512_setzero_pd(); }
  static PISSA_INLINE Reg64 load64(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
  static PISSA_INLINE Reg64 fma64(Reg64 a, Reg64 b, Reg64 c) { return _mm512_fmadd_pd(a, b, c); }
  static PISSA_INLINE void store64(double* to, Reg64 value) { _mm512_storeu_pd(to, value); }

  static PISSA_INLINE Reg gather(const float* map, const std::uint8_t* indices) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices));
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), map, 4);
  }

  struct Reg2 {
    Reg a, b;
  };

  static constexpr int kMostBlocks = 2;
  template <int blocks>
  struct Table {
    Reg levels[blocks];
  };
  template <int blocks>
  static PISSA_INLINE Table<blocks> table(const float* levels, const float* scales) {
    Table<blocks> scaled;
    for (int i = 0; i < blocks; ++i) scaled.levels[i] = mul(load(levels), broadcast(scales[i]));
    return scaled;
  }
  static PISSA_INLINE Table<1> table_from(const float* levels, float scale, float minimum) {
    return {{fma(load(levels), broadcast(scale), broadcast(minimum))}};
  }
  static PISSA_INLINE Reg2 decode_split(const Table<1>& table, const std::uint8_t* bytes) {
    const __m512i codes = load_codes(bytes);
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table.levels[0]),
            _mm512_permutexvar_ps(codes, table.levels[0])};
  }
  static PISSA_INLINE Reg2 decode_split(const Table<2>& table, const std::uint8_t* bytes) {
    const __m512i block = _mm512_set_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i codes = load_codes(bytes);
    const __m512i high = _mm512_or_si512(_mm512_srli_epi32(codes, 4), block);
    const __m512i low = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi32(15)), block);
    return {_mm512_permutex2var_ps(table.levels[0], high, table.levels[1]),
            _mm512_permutex2var_ps(table.levels[0], low, table.levels[1])};
  }
  static PISSA_INLINE Reg look_up(const Table<1>& table, __m512i codes) {  // by the low four bits of each lane
    return _mm512_permutexvar_ps(codes, table.levels[0]);
  }
  using Words = __m512i;
  static PISSA_INLINE Words shift_right(Words words, int count) { return _mm512_srli_epi32(words, count); }
  static constexpr bool kLoadsLanes = true;
  static PISSA_INLINE void load_lanes(const std::uint8_t* from, std::int64_t ld, Words (&words)[4]) {
    Reg rows[4];
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int j) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (i + 4 * j) * ld));
      };
      const Words half = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
      rows[i] = _mm512_castsi512_ps(_mm512_inserti32x4(_mm512_inserti32x4(half, row(2), 2), row(3), 3));
    }
    transpose_quads(rows);
    for (int i = 0; i < 4; ++i) words[i] = _mm512_castps_si512(rows[i]);
  }
  static PISSA_INLINE __m512i load_codes(const std::uint8_t* bytes) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  static PISSA_INLINE Reg2 interleave(Reg2 split) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    return {_mm512_permutex2var_ps(split.a, first, split.b), _mm512_permutex2var_ps(split.a, second, split.b)};
  }

  // The transpose of 4 x 4 in each quarter of four registers.
  static PISSA_INLINE void transpose_quads(Reg* row) {
    __m512d pair[4];
    for (int i = 0; i < 4; i += 2) {
      pair[i] = _mm512_castps_pd(_mm512_unpacklo_ps(row[i], row[i + 1]));
      pair[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(row[i], row[i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
      row[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[i], pair[i + 2]));
      row[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[i], pair[i + 2]));
    }
  }
  static PISSA_INLINE void transpose(Reg (&row)[16]) {
    for (int i = 0; i < 16; i += 4) transpose_quads(row + i);
    Reg quarter[16];
    for (int i = 0; i < 4; ++i) {
      quarter[i] = _mm512_shuffle_f32x4(row[i], row[i + 4], 0x88);
      quarter[i + 4] = _mm512_shuffle_f32x4(row[i], row[i + 4], 0xdd);
      quarter[i + 8] = _mm512_shuffle_f32x4(row[i + 8], row[i + 12], 0x88);
      quarter[i + 12] = _mm512_shuffle_f32x4(row[i + 8], row[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      row[i] = _mm512_shuffle_f32x4(quarter[i], quarter[i + 8], 0x88);
      row[i + 8] = _mm512_shuffle_f32x4(quarter[i], quarter[i + 8], 0xdd);
    }
  }
};

}  // namespace pissa::cpu::PISSA_ISA
