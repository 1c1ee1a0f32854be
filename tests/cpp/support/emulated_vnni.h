// AVX-VNNI's product, as vec/vnni.h uses it, in AVX2, after Intel's manual (volume 2, VPDPBUSD). Included before
// kernels.cc.
#pragma once

#include <immintrin.h>

namespace pissa::test {

inline __attribute__((always_inline)) __m256i dpbusd(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  const auto quarter = [](__m256i u, __m256i s) {  // sums of four products each, of the 16 bytes of one half
    const __m256i products = _mm256_madd_epi16(u, s);
    return _mm256_add_epi32(products, _mm256_shuffle_epi32(products, 0xb1));  // each of them twice
  };
  const auto half = [&](int which) {
    const __m128i u = which ? _mm256_extracti128_si256(unsigned_bytes, 1) : _mm256_castsi256_si128(unsigned_bytes);
    const __m128i s = which ? _mm256_extracti128_si256(signed_bytes, 1) : _mm256_castsi256_si128(signed_bytes);
    return _mm256_permutevar8x32_epi32(quarter(_mm256_cvtepu8_epi16(u), _mm256_cvtepi8_epi16(s)),
                                       _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  };
  return _mm256_add_epi32(sum, _mm256_blend_epi32(half(0), half(1), 0xf0));
}

}  // namespace pissa::test

#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 ::pissa::test::dpbusd
