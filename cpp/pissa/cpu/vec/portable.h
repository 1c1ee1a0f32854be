// Plain C++, which compilers turn into the vectors that every processor of a family has: SSE2, NEON.
#pragma once

#include <cstdint>

#include "pissa/core/fp8.h"
#include "pissa/core/nf4.h"
#include "pissa/core/types.h"

namespace pissa::cpu::PISSA_ISA {

struct Vec {
  struct Reg {
    float lane[4];
  };
  struct Reg64 {
    double lane[2];
  };
  static constexpr int kWidth = 4;
  static constexpr int kRegisters = 16;
  static constexpr int kRows = 4;
  static constexpr bool kByLane = false;
  static constexpr bool kLoadsLanes = false;

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

  static PISSA_INLINE Reg load_i8(const std::int8_t* from) {
    return each([&](int i) { return static_cast<float>(from[i]); });
  }
  static PISSA_INLINE Reg load_f8(const std::uint8_t* from) {
    return each([&](int i) { return e4m3_value(from[i]) / 256.0f; });
  }
  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return each([&](int i) { return widen_f16(from[i]); });
  }
  static PISSA_INLINE float load_half(const void* from) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return widen_f16(bits);
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
  static constexpr int kMostBlocks = 1;
  struct Table {
    float levels[16];
  };
  template <int blocks>
  static PISSA_INLINE Table table(const float* levels, const float* scales) {
    Table scaled;
    for (int i = 0; i < 16; ++i) scaled.levels[i] = levels[i] * *scales;
    return scaled;
  }
  static PISSA_INLINE Table table_from(const float* levels, float scale, float minimum) {
    Table shifted;
    for (int i = 0; i < 16; ++i) shifted.levels[i] = levels[i] * scale + minimum;
    return shifted;
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

  // IEEE half precision via a float scaled by 2^112, which handles subnormals correctly.
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

}  // namespace pissa::cpu::PISSA_ISA
