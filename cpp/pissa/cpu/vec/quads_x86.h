// Products of four bytes a word, those of the first factor signed, those of the second unsigned: by VNNI, of 512 or of
// 256 bits; or by AVX2, which adds up two products in 16 bits first, so that a weight's bytes have seven.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/types.h"

namespace pissa::cpu::PISSA_ISA {

struct Quads {
#if defined(__AVX512VNNI__)
  static constexpr int kLargest = 127;
  using Sum = __m512i;
  static PISSA_INLINE Sum mac(Vec::Reg a, Vec::Reg b, Sum c) {
    return _mm512_dpbusd_epi32(c, _mm512_castps_si512(b), _mm512_castps_si512(a));
  }
  static PISSA_INLINE Sum broadcast_int(std::int32_t value) { return _mm512_set1_epi32(value); }
  static PISSA_INLINE Vec::Reg to_float(Sum sum) { return _mm512_cvtepi32_ps(sum); }
#else
  using Sum = __m256i;
#if defined(__AVXVNNI__)
  static constexpr int kLargest = 127;
  static PISSA_INLINE Sum mac(Vec::Reg a, Vec::Reg b, Sum c) {
    return _mm256_dpbusd_avx_epi32(c, _mm256_castps_si256(b), _mm256_castps_si256(a));
  }
#else
  static constexpr int kLargest = 63;
  static PISSA_INLINE Sum mac(Vec::Reg a, Vec::Reg b, Sum c) {
    static_assert(2 * 127 * (2 * kLargest + 1) < 1 << 15, "pairs of products would saturate");
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_castps_si256(b), _mm256_castps_si256(a));
    Sum sum = _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    __asm__("" : "+x"(sum));  // GCC would add up in another order, for which it has too few registers
    return sum;
  }
#endif
  static PISSA_INLINE Sum broadcast_int(std::int32_t value) { return _mm256_set1_epi32(value); }
  static PISSA_INLINE Vec::Reg to_float(Sum sum) { return _mm256_cvtepi32_ps(sum); }
#endif

  static constexpr int kOffset = kLargest + 1;  // that is added to a weight's byte

  using Table = __m256i;  // 16 bytes, twice
  using Codes = __m256i;  // 32 of four bits, a byte each

  static PISSA_INLINE Table table(const float* levels, float scale, float minimum) {
#if defined(__AVX512VNNI__)
    const __m512 values = _mm512_fmadd_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale), _mm512_set1_ps(minimum));
    const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(values));
    return with_offset(_mm256_broadcastsi128_si256(bytes));
#else
    const __m256 factor = _mm256_set1_ps(scale), least = _mm256_set1_ps(minimum);
    const __m256i low = _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(levels), factor, least));
    const __m256i high = _mm256_cvtps_epi32(_mm256_fmadd_ps(_mm256_loadu_ps(levels + 8), factor, least));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m256i bytes = _mm256_packs_epi16(words, words);  // levels 0 to 7 in the lower half, 8 to 15 in the upper
    return with_offset(_mm256_permute4x64_epi64(bytes, 0x88));
#endif
  }
  static PISSA_INLINE void look_up(Table table, Codes codes, std::uint8_t* to) {
    store(to, _mm256_shuffle_epi8(table, codes));
  }
  // Of 16 bytes: the nibbles in turn, the low ones first or the high ones.
  template <bool low_first>
  static PISSA_INLINE Codes codes_in_turn(const std::uint8_t* bytes) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)), mask = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(all, mask), high = _mm_and_si128(_mm_srli_epi16(all, 4), mask);
    const __m128i one = low_first ? low : high, other = low_first ? high : low;
    return _mm256_set_m128i(_mm_unpackhi_epi8(one, other), _mm_unpacklo_epi8(one, other));
  }
  // Of 16 bytes: the low nibbles, then the high ones.
  static PISSA_INLINE Codes codes_in_halves(const std::uint8_t* bytes) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(all, 4), all), _mm256_set1_epi8(15));
  }
  // Of 32 bytes: the nibbles from bit `shift` on.
  static PISSA_INLINE Codes codes_at(const std::uint8_t* bytes, int shift) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    return _mm256_and_si256(_mm256_srli_epi16(all, shift), _mm256_set1_epi8(15));
  }
  // to[4 * i + k] = row k's element i, for 32 codes each of four rows, looked up in its table.
  static PISSA_INLINE void look_up_four(const Table (&tables)[4], const Codes (&codes)[4], std::uint8_t* to) {
    __m256i row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm256_shuffle_epi8(tables[i], codes[i]);
    const __m256i a = _mm256_unpacklo_epi8(row[0], row[1]), b = _mm256_unpackhi_epi8(row[0], row[1]);
    const __m256i c = _mm256_unpacklo_epi8(row[2], row[3]), d = _mm256_unpackhi_epi8(row[2], row[3]);
    const __m256i words[4] = {_mm256_unpacklo_epi16(a, c), _mm256_unpackhi_epi16(a, c), _mm256_unpacklo_epi16(b, d),
                              _mm256_unpackhi_epi16(b, d)};  // elements 0 and 16, 4 and 20, 8 and 24, 12 and 28 on
    store(to, _mm256_permute2x128_si256(words[0], words[1], 0x20));
    store(to + 32, _mm256_permute2x128_si256(words[2], words[3], 0x20));
    store(to + 64, _mm256_permute2x128_si256(words[0], words[1], 0x31));
    store(to + 96, _mm256_permute2x128_si256(words[2], words[3], 0x31));
  }

 private:
  static PISSA_INLINE __m256i with_offset(__m256i bytes) {
    return _mm256_add_epi8(bytes, _mm256_set1_epi8(static_cast<char>(kOffset)));
  }
  static PISSA_INLINE void store(std::uint8_t* to, __m256i value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
  }
};

}  // namespace pissa::cpu::PISSA_ISA
