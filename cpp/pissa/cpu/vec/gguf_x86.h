// What AVX2 and AVX-512 have in common for the blocks of GGUF files.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pissa/core/format.h"

namespace pissa::cpu::PISSA_ISA {

// 16 bytes, and the same shifted to the right by four bits: the low nibbles of each byte are codes, those of the low
// nibbles first. Their high nibbles are arbitrary.
PISSA_INLINE __m256i both_nibbles(const std::uint8_t* bytes) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_srli_epi16(low, 4), 1);
}

// The codes of eight scales and eight minima, as bytes (GgufSixBits).
PISSA_INLINE __m128i six_bits(const std::uint8_t* block) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block));
  const __m128i own = _mm_shuffle_epi8(bytes, _mm_set_epi32(0x0f0e0d0c, 0x0b0a0908, 0x0f0e0d0c, 0x07060504));
  const __m128i others = _mm_shuffle_epi8(bytes, _mm_set_epi32(0x0b0a0908, -1, 0x07060504, -1));
  const __m128i low = _mm_and_si128(_mm_srlv_epi32(own, _mm_set_epi32(4, 0, 0, 0)),
                                    _mm_set_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
  return _mm_or_si128(low, _mm_and_si128(_mm_srli_epi32(others, 2), _mm_set1_epi8(0x30)));
}

// Stores 32 codes of five bits, less a bias: the codes of both_nibbles, each with 16 where `fifth` has 16.
PISSA_INLINE void store_fives(std::int8_t* to, const std::uint8_t* nibbles, __m256i fifth, int bias) {
  const __m256i codes = _mm256_or_si256(_mm256_and_si256(both_nibbles(nibbles), _mm256_set1_epi8(15)), fifth);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_sub_epi8(codes, _mm256_set1_epi8(static_cast<char>(bias))));
}

}  // namespace pissa::cpu::PISSA_ISA
