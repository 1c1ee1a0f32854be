// AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/nf4.h"
#include "pissa/core/types.h"
#include "pissa/cpu/vec/gguf_x86.h"

namespace pissa::cpu::PISSA_ISA {

struct Vec {
  using Reg = __m256;
  using Reg64 = __m256d;
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 16;
  static constexpr int kRows = 6;
  static constexpr bool kByLane = false;

  static PISSA_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static PISSA_INLINE Reg broadcast(float value) { return _mm256_set1_ps(value); }
  static PISSA_INLINE Reg load(const float* from) { return _mm256_loadu_ps(from); }
  static PISSA_INLINE void store(float* to, Reg value) { _mm256_storeu_ps(to, value); }
  static PISSA_INLINE Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static PISSA_INLINE float reduce_add(Reg a) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static PISSA_INLINE float reduce_max_bits(Reg a) {
    const __m256i bits = _mm256_castps_si256(a);
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(most));
  }
  static PISSA_INLINE Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static PISSA_INLINE Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static PISSA_INLINE Reg max_bits(Reg a, Reg b) {
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static PISSA_INLINE Reg abs(Reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static PISSA_INLINE void store_codes(std::uint8_t* to, Reg value, const Nf4Search&) {
    __m256i code = _mm256_setzero_si256();
    for (int i = 0; i < 15; ++i) {
      const Reg above = _mm256_cmp_ps(value, _mm256_set1_ps(kNf4Thresholds.value[i]), _CMP_GT_OQ);
      code = _mm256_sub_epi32(code, _mm256_castps_si256(above));  // true is -1
    }
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    const __m128i pairs = _mm_madd_epi16(words, _mm_set1_epi32(1 << 16 | 16));  // 16 * even + odd
    const __m128i bytes = _mm_packus_epi16(_mm_packus_epi32(pairs, pairs), pairs);
    _mm_storeu_si32(to, bytes);
  }
  static PISSA_INLINE Reg load_i8(const std::int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static PISSA_INLINE void store_five_bits(std::int8_t* to, const std::uint8_t* nibbles, std::uint32_t fifth,
                                           int bias) {
    const __m256i byte_of_lane = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i mask = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201u));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(fifth)), byte_of_lane);
    const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, mask), mask);
    store_fives(to, nibbles, _mm256_and_si256(is_set, _mm256_set1_epi8(16)), bias);
  }
  static PISSA_INLINE void store_six_bits(float* to, const std::uint8_t* block) {
    const auto numbers = [](__m128i eight) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)); };
    const __m128i codes = six_bits(block);
    store(to, mul(numbers(codes), broadcast(load_half(block))));
    store(to + 8, mul(numbers(_mm_srli_si128(codes, 8)), broadcast(-load_half(block + 2))));
  }
  // Places sign, exponent and fraction as in f16: the number divided by the ratio of biases, 2^(15 - 7). Not NaN.
  static PISSA_INLINE Reg load_f8(const std::uint8_t* from) {
    const __m128i codes = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(codes, 7), _mm_set1_epi16(-0x4080)));
  }
  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static PISSA_INLINE float load_half(const void* from) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _cvtsh_ss(bits);
  }
  static PISSA_INLINE void store_f16(std::uint16_t* to, Reg value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }

  static PISSA_INLINE Reg64 zero64() { return _mm256_setzero_pd(); }
  static PISSA_INLINE Reg64 load64(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
  static PISSA_INLINE Reg64 fma64(Reg64 a, Reg64 b, Reg64 c) { return _mm256_fmadd_pd(a, b, c); }
  static PISSA_INLINE void store64(double* to, Reg64 value) { _mm256_storeu_pd(to, value); }

  static PISSA_INLINE Reg gather(const float* map, const std::uint8_t* indices) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(indices));
    return _mm256_i32gather_ps(map, _mm256_cvtepu8_epi32(bytes), 4);
  }

  struct Reg2 {
    Reg a, b;
  };
  static constexpr int kMostBlocks = 1;
  struct Table {
    Reg low;   // levels 0 to 7
    Reg high;  // levels 8 to 15
  };
  template <int blocks>
  static PISSA_INLINE Table table(const float* levels, const float* scales) {
    return {mul(load(levels), broadcast(*scales)), mul(load(levels + 8), broadcast(*scales))};
  }
  static PISSA_INLINE Table table_from(const float* levels, float scale, float minimum) {
    const Reg factor = broadcast(scale), least = broadcast(minimum);
    return {fma(load(levels), factor, least), fma(load(levels + 8), factor, least)};
  }
  static PISSA_INLINE Reg look_up(const Table& table, __m256i codes) {         // by the low four bits of each lane
    const Reg upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes), _mm256_permutevar8x32_ps(table.high, codes),
                            upper_half);
  }
  static PISSA_INLINE Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    return {look_up(table, _mm256_srli_epi32(codes, 4)), look_up(table, codes)};
  }
  using Words = __m256i;
  static PISSA_INLINE Words shift_right(Words words, int count) { return _mm256_srli_epi32(words, count); }
  static constexpr bool kLoadsLanes = true;
  static PISSA_INLINE void load_lanes(const std::uint8_t* from, std::int64_t ld, Words (&words)[4]) {
    Reg rows[4];
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int j) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + (i + 4 * j) * ld));
      };
      rows[i] = _mm256_castsi256_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1));
    }
    transpose_quads(rows);
    for (int i = 0; i < 4; ++i) words[i] = _mm256_castps_si256(rows[i]);
  }
  static PISSA_INLINE Reg2 interleave(Reg2 split) {
    const Reg low = _mm256_unpacklo_ps(split.a, split.b);   // elements 0-3 | 8-11
    const Reg high = _mm256_unpackhi_ps(split.a, split.b);  // elements 4-7 | 12-15
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }

  // The transpose of 4 x 4 in each half of four registers.
  static PISSA_INLINE void transpose_quads(Reg* row) {
    __m256d pair[4];
    for (int i = 0; i < 4; i += 2) {
      pair[i] = _mm256_castps_pd(_mm256_unpacklo_ps(row[i], row[i + 1]));
      pair[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(row[i], row[i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
      row[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(pair[i], pair[i + 2]));
      row[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pair[i], pair[i + 2]));
    }
  }
  static PISSA_INLINE void transpose(Reg (&row)[8]) {
    for (int i = 0; i < 8; i += 4) transpose_quads(row + i);
    for (int i = 0; i < 4; ++i) {
      const Reg low = row[i];
      row[i] = _mm256_permute2f128_ps(low, row[i + 4], 0x20);
      row[i + 4] = _mm256_permute2f128_ps(low, row[i + 4], 0x31);
    }
  }
};

}  // namespace pissa::cpu::PISSA_ISA
