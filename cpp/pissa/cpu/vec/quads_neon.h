// The dot-product extension in addition to NEON (Armv8.4, Neoverse N1, Cortex-A76, Apple M1): products of four signed
// bytes a word.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/vec/neon.h"

namespace pissa::cpu::PISSA_ISA {

struct Quads {
  static constexpr int kLargest = 127, kOffset = 0;
  using Sum = int32x4_t;
  static PISSA_INLINE Sum mac(Vec::Reg a, Vec::Reg b, Sum c) {
    return vdotq_s32(c, vreinterpretq_s8_f32(a), vreinterpretq_s8_f32(b));
  }
  static PISSA_INLINE Sum broadcast_int(std::int32_t value) { return vdupq_n_s32(value); }
  static PISSA_INLINE Vec::Reg to_float(Sum sum) { return vcvtq_f32_s32(sum); }

  using Table = uint8x16_t;
  using Codes = uint8x16x2_t;  // 32 of four bits, a byte each

  static PISSA_INLINE Table table(const float* levels, float scale, float minimum) {
    int16x4_t four[4];
    for (int i = 0; i < 4; ++i) {
      const Vec::Reg values = Vec::fma(Vec::load(levels + 4 * i), Vec::broadcast(scale), Vec::broadcast(minimum));
      four[i] = vqmovn_s32(vcvtnq_s32_f32(values));
    }
    const int8x8_t low = vqmovn_s16(vcombine_s16(four[0], four[1])), high = vqmovn_s16(vcombine_s16(four[2], four[3]));
    return vreinterpretq_u8_s8(vcombine_s8(low, high));
  }
  static PISSA_INLINE void look_up(Table table, Codes codes, std::uint8_t* to) {
    for (int i = 0; i < 2; ++i) vst1q_u8(to + 16 * i, vqtbl1q_u8(table, codes.val[i]));
  }
  // Of 16 bytes: the nibbles in turn, the low ones first or the high ones.
  template <bool low_first>
  static PISSA_INLINE Codes codes_in_turn(const std::uint8_t* bytes) {
    const Codes halves = codes_in_halves(bytes);
    const uint8x16_t one = halves.val[low_first ? 0 : 1], other = halves.val[low_first ? 1 : 0];
    return {{vzip1q_u8(one, other), vzip2q_u8(one, other)}};
  }
  // Of 16 bytes: the low nibbles, then the high ones.
  static PISSA_INLINE Codes codes_in_halves(const std::uint8_t* bytes) {
    const uint8x16_t all = vld1q_u8(bytes);
    return {{vandq_u8(all, vdupq_n_u8(15)), vshrq_n_u8(all, 4)}};
  }
  // Of 32 bytes: the nibbles from bit `shift` on.
  static PISSA_INLINE Codes codes_at(const std::uint8_t* bytes, int shift) {
    const int8x16_t right = vdupq_n_s8(static_cast<std::int8_t>(-shift));
    Codes codes;
    for (int i = 0; i < 2; ++i) {
      codes.val[i] = vandq_u8(vshlq_u8(vld1q_u8(bytes + 16 * i), right), vdupq_n_u8(15));
    }
    return codes;
  }
  // to[4 * i + k] = row k's element i, for 32 codes each of four rows, looked up in its table.
  static PISSA_INLINE void look_up_four(const Table (&tables)[4], const Codes (&codes)[4], std::uint8_t* to) {
    for (int half = 0; half < 2; ++half) {
      uint8x16x4_t rows;
      for (int row = 0; row < 4; ++row) rows.val[row] = vqtbl1q_u8(tables[row], codes[row].val[half]);
      vst4q_u8(to + 64 * half, rows);
    }
  }
};

}  // namespace pissa::cpu::PISSA_ISA
