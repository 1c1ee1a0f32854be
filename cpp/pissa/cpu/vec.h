// One vector of f32 (and half a vector's worth of f64), for the instruction set this file is compiled for, and how the
// 32-bit words of a GEMM's panels multiply: F32, one f32 a word, everywhere; Bf16, a pair of bf16 a word, where the
// instruction set has the dot product of pairs (PISSA_HAS_BF16).
//
// kernels.cc is compiled once per instruction set; PISSA_ISA names the namespace, so that no two builds of a function
// share a symbol. Everything here is inlined by force, for the same reason.
//
// kWidth: f32 lanes. kRows x (2 * kWidth): the register tile of the GEMM, chosen to fill the register file:
// AVX-512 14 x 32 (28 of 32 registers accumulate), AVX2 6 x 16 (12 of 16), portable 4 x 8.
#pragma once

#include <cstdint>

#include "pissa/core/nf4.h"
#include "pissa/core/types.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__)
#define PISSA_HAS_BF16 1
#else
#define PISSA_HAS_BF16 0
#endif

namespace pissa::cpu::PISSA_ISA {

// Bits of a bf16, also where it shares memory with the words of a panel.
using Half = std::uint16_t __attribute__((may_alias));

PISSA_INLINE float widen_bf16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

PISSA_INLINE std::uint16_t round_to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

#if defined(__AVX512F__)

struct Vec {
  using Reg = __m512;
  using Reg64 = __m512d;
  static constexpr int kWidth = 16;
  static constexpr int kRows = 14;

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
  static PISSA_INLINE Reg max_bits(Reg a, Reg b) {  // the larger as an unsigned integer
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static PISSA_INLINE Reg abs(Reg a) { return _mm512_abs_ps(a); }
  // kWidth / 2 bytes: the codes of kWidth values, each the number of thresholds below it, two a byte
  static PISSA_INLINE void store_codes(std::uint8_t* to, Reg value, const Nf4Search& search) {
    const Reg place = fma(value, broadcast(Nf4Search::kFactor), broadcast(Nf4Search::kShift));
    const __m512i cell = _mm512_cvttps_epi32(place);  // of NaN: 0, in the bits that count
    const Reg threshold = _mm512_permutex2var_ps(load(search.threshold), cell, load(search.threshold + 16));
    const __m512i base =
        _mm512_permutex2var_epi32(_mm512_loadu_si512(search.base), cell, _mm512_loadu_si512(search.base + 16));
    const __mmask16 above = _mm512_cmp_ps_mask(value, threshold, _CMP_GT_OQ);
    const __m512i code = _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
    const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8(pair));
  }
  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
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

  // 16 levels, looked up by the low four bits of each lane.
  struct Table {
    Reg levels;
  };
  static PISSA_INLINE Table table(const float* levels, float scale) { return {mul(load(levels), broadcast(scale))}; }
  // Elements of kWidth bytes, those in the high nibbles and those in the low ones.
  static PISSA_INLINE Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table.levels),
            _mm512_permutexvar_ps(codes, table.levels)};
  }
  static PISSA_INLINE Reg2 interleave(Reg2 split) {  // a0 b0 a1 b1 ...
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    return {_mm512_permutex2var_ps(split.a, first, split.b), _mm512_permutex2var_ps(split.a, second, split.b)};
  }

  static PISSA_INLINE void transpose(Reg (&row)[16]) {
    __m512d pair[16];
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_castps_pd(_mm512_unpacklo_ps(row[i], row[i + 1]));
      pair[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(row[i], row[i + 1]));
    }
    for (int i = 0; i < 16; i += 4) {
      row[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[i], pair[i + 2]));
      row[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[i], pair[i + 2]));
      row[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[i + 1], pair[i + 3]));
      row[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[i + 1], pair[i + 3]));
    }
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

#elif defined(__AVX2__)

struct Vec {
  using Reg = __m256;
  using Reg64 = __m256d;
  static constexpr int kWidth = 8;
  static constexpr int kRows = 6;

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
  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
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
  struct Table {
    Reg low;   // levels 0 to 7
    Reg high;  // levels 8 to 15
  };
  static PISSA_INLINE Table table(const float* levels, float scale) {
    return {mul(load(levels), broadcast(scale)), mul(load(levels + 8), broadcast(scale))};
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
  static PISSA_INLINE Reg2 interleave(Reg2 split) {
    const Reg low = _mm256_unpacklo_ps(split.a, split.b);   // elements 0-3 | 8-11
    const Reg high = _mm256_unpackhi_ps(split.a, split.b);  // elements 4-7 | 12-15
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }

  static PISSA_INLINE void transpose(Reg (&row)[8]) {
    __m256d pair[8];
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_castps_pd(_mm256_unpacklo_ps(row[i], row[i + 1]));
      pair[i + 1] = _mm256_castps_pd(_mm256_unpackhi_ps(row[i], row[i + 1]));
    }
    for (int i = 0; i < 8; i += 4) {
      row[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(pair[i], pair[i + 2]));
      row[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(pair[i], pair[i + 2]));
      row[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(pair[i + 1], pair[i + 3]));
      row[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(pair[i + 1], pair[i + 3]));
    }
    for (int i = 0; i < 4; ++i) {
      const Reg low = row[i];
      row[i] = _mm256_permute2f128_ps(low, row[i + 4], 0x20);
      row[i + 4] = _mm256_permute2f128_ps(low, row[i + 4], 0x31);
    }
  }
};

#else  // portable: plain C++, which compilers turn into SSE2 or NEON

struct Vec {
  struct Reg {
    float lane[4];
  };
  struct Reg64 {
    double lane[2];
  };
  static constexpr int kWidth = 4;
  static constexpr int kRows = 4;

  template <class F>
  static PISSA_INLINE Reg each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static PISSA_INLINE Reg zero() { return {}; }
  static PISSA_INLINE Reg broadcast(float value) { return {{value, value, value, value}}; }
  static PISSA_INLINE Reg load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
  static PISSA_INLINE void store(float* to, Reg value) { __builtin_memcpy(to, value.lane, sizeof value.lane); }
  static PISSA_INLINE Reg add(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static PISSA_INLINE float reduce_add(Reg a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
  static PISSA_INLINE float max_bits(float a, float b) {
    std::uint32_t bits[2];
    __builtin_memcpy(bits, &a, 4);
    __builtin_memcpy(bits + 1, &b, 4);
    return bits[0] > bits[1] ? a : b;
  }
  static PISSA_INLINE Reg max_bits(Reg a, Reg b) {
    return each([&](int i) { return max_bits(a.lane[i], b.lane[i]); });
  }
  static PISSA_INLINE float reduce_max_bits(Reg a) {
    return max_bits(max_bits(a.lane[0], a.lane[1]), max_bits(a.lane[2], a.lane[3]));
  }
  static PISSA_INLINE Reg mul(Reg a, Reg b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static PISSA_INLINE Reg fma(Reg a, Reg b, Reg c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static PISSA_INLINE Reg abs(Reg a) {
    return each([&](int i) { return __builtin_fabsf(a.lane[i]); });
  }
  static PISSA_INLINE void store_codes(std::uint8_t* to, Reg value, const Nf4Search&) {
    for (int lane = 0; lane < kWidth; lane += 2) {
      to[lane / 2] = static_cast<std::uint8_t>(nf4_code(value.lane[lane]) << 4 | nf4_code(value.lane[lane + 1]));
    }
  }
  static PISSA_INLINE Reg64 zero64() { return {}; }
  static PISSA_INLINE Reg64 load64(const float* from) { return {{from[0], from[1]}}; }
  static PISSA_INLINE Reg64 fma64(Reg64 a, Reg64 b, Reg64 c) {
    return {{a.lane[0] * b.lane[0] + c.lane[0], a.lane[1] * b.lane[1] + c.lane[1]}};
  }
  static PISSA_INLINE void store64(double* to, Reg64 value) { __builtin_memcpy(to, value.lane, sizeof value.lane); }

  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return each([&](int i) { return widen_f16(from[i]); });
  }
  static PISSA_INLINE void store_f16(std::uint16_t* to, Reg value) {
    for (int i = 0; i < kWidth; ++i) to[i] = round_to_f16(value.lane[i]);
  }

  static PISSA_INLINE Reg gather(const float* map, const std::uint8_t* indices) {
    return each([&](int i) { return map[indices[i]]; });
  }

  struct Reg2 {
    Reg a, b;
  };
  struct Table {
    float levels[16];
  };
  static PISSA_INLINE Table table(const float* levels, float scale) {
    Table scaled;
    for (int i = 0; i < 16; ++i) scaled.levels[i] = levels[i] * scale;
    return scaled;
  }
  static PISSA_INLINE Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    return {each([&](int i) { return table.levels[bytes[i] >> 4]; }),
            each([&](int i) { return table.levels[bytes[i] & 15]; })};
  }
  static PISSA_INLINE Reg2 interleave(Reg2 split) {
    return {{{split.a.lane[0], split.b.lane[0], split.a.lane[1], split.b.lane[1]}},
            {{split.a.lane[2], split.b.lane[2], split.a.lane[3], split.b.lane[3]}}};
  }

  static PISSA_INLINE void transpose(Reg (&row)[4]) {
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < i; ++j) {
        const float value = row[i].lane[j];
        row[i].lane[j] = row[j].lane[i];
        row[j].lane[i] = value;
      }
    }
  }

  // IEEE half precision by way of a float scaled by 2^112, which makes subnormals come out right.
  static PISSA_INLINE float widen_f16(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    std::uint32_t magnitude = (bits & 0x7fffu) << 13;
    const bool special = magnitude >= 0x0f800000u;  // Inf or NaN
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    __builtin_memcpy(&magnitude, &value, 4);
    magnitude |= (special ? 0x7f800000u : 0u) | sign;
    __builtin_memcpy(&value, &magnitude, 4);
    return value;
  }
  static PISSA_INLINE std::uint16_t round_to_f16(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
    if (bits >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds beyond 65504: Inf
    if (bits < 0x38800000u) {  // below 2^-14: let the addition of 0.5 round to a multiple of 2^-24
      float magnitude;
      __builtin_memcpy(&magnitude, &bits, 4);
      magnitude += 0.5f;
      __builtin_memcpy(&bits, &magnitude, 4);
      return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
    }
    bits += 0xc8000fffu + ((bits >> 13) & 1u);  // exponent bias 127 -> 15, half an ulp, ties to even
    return static_cast<std::uint16_t>(sign | (bits >> 13));
  }
};

#endif

// A word is one f32.
struct F32 {
  using Element = float;
  using Table = Vec::Table;
  static constexpr int kPerWord = 1;
  static constexpr int kDecodeBytes = Vec::kWidth;  // what one decode reads; it gives twice as many elements

  static PISSA_INLINE Vec::Reg mac(Vec::Reg a, Vec::Reg b, Vec::Reg c) { return Vec::fma(a, b, c); }
  static PISSA_INLINE float round(float value) { return value; }
  static PISSA_INLINE Table table(const float* levels, float scale) { return Vec::table(levels, scale); }
  static PISSA_INLINE Vec::Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    return Vec::decode_split(table, bytes);
  }
  static PISSA_INLINE void decode(const Table& table, const std::uint8_t* bytes, float* to) {
    const Vec::Reg2 values = Vec::interleave(Vec::decode_split(table, bytes));
    Vec::store(to, values.a);
    Vec::store(to + Vec::kWidth, values.b);
  }
};

#if PISSA_HAS_BF16

// A word is a pair of bf16, the element of the lower index in the lower half. Products are exact, sums f32; the
// instruction takes denormals for zero.
struct Bf16 {
  using Element = Half;
  struct Table {
    __m512i levels;  // 16 bf16, twice: vpermw looks at five bits of a lane
  };
  static constexpr int kPerWord = 2;
  static constexpr int kDecodeBytes = 32;

  static PISSA_INLINE Vec::Reg mac(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static PISSA_INLINE Half round(float value) { return round_to_bf16(value); }
  // level * scale, rounded once: what a dequantisation to bf16 gives
  static PISSA_INLINE Table table(const float* levels, float scale) {
    const __m256bh scaled = _mm512_cvtneps_pbh(Vec::mul(Vec::load(levels), Vec::broadcast(scale)));
    return {_mm512_broadcast_i64x4(reinterpret_cast<__m256i>(scaled))};
  }
  static PISSA_INLINE Vec::Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table.levels)),
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(codes, table.levels))};
  }
  // 32-bit lanes of (a, b) pairs from 16-bit lanes of a and of b
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

#endif

}  // namespace pissa::cpu::PISSA_ISA
