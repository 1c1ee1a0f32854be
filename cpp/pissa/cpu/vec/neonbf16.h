// The BF16 extension in addition to NEON (Armv8.6, Neoverse V1 and N2, Apple M2): products of bf16 pairs. BFDOT treats
// denormals as zero and rounds to odd, so its sums may differ from other machines' in the last bit.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/vec/bf16.h"
#include "pissa/cpu/vec/neon.h"

namespace pissa::cpu::PISSA_ISA {

struct Pairs {
  static constexpr int kMostBlocks = 1;
  struct Table {
    uint8x16_t low, high;  // bytes of 16 bf16
  };

  static PISSA_INLINE Vec::Reg mac(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return vbfdotq_f32(c, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
  }
  template <int lane>
  static PISSA_INLINE Vec::Reg mac_lane(Vec::Reg a, Vec::Reg b, Vec::Reg c) {
    return vbfdotq_laneq_f32(c, vreinterpretq_bf16_f32(b), vreinterpretq_bf16_f32(a), lane);
  }
  static PISSA_INLINE void store(Half* to, Vec::Reg2 values) {
    vst1q_u16(to, vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(values.a), values.b)));
  }
  template <int blocks>
  static PISSA_INLINE Table table(const float* levels, const float* scales) {
    return rounded(Vec::template table<blocks>(levels, scales));
  }
  static PISSA_INLINE Table table_from(const float* levels, float scale, float minimum) {
    return rounded(Vec::table_from(levels, scale, minimum));
  }
  static PISSA_INLINE Vec::Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    const uint8x8_t codes = vld1_u8(bytes);
    return look_up(table, vcombine_u8(vshr_n_u8(codes, 4), vand_u8(codes, vdup_n_u8(15))));
  }
  static PISSA_INLINE Vec::Reg2 interleave(Vec::Reg2 split) {
    const uint16x8_t a = vreinterpretq_u16_f32(split.a);
    const uint16x8_t b = vreinterpretq_u16_f32(split.b);
    return {vreinterpretq_f32_u16(vzip1q_u16(a, b)), vreinterpretq_f32_u16(vzip2q_u16(a, b))};
  }
  template <bool low_first>
  static PISSA_INLINE void decode(const Table& table, const std::uint8_t* bytes, Half* to) {
    const uint8x8_t codes = vld1_u8(bytes);
    const uint8x8_t high = vshr_n_u8(codes, 4);
    const uint8x8_t low = vand_u8(codes, vdup_n_u8(15));
    const uint8x8_t one = low_first ? low : high, other = low_first ? high : low;
    const Vec::Reg2 values = look_up(table, vcombine_u8(vzip1_u8(one, other), vzip2_u8(one, other)));
    Vec::store(reinterpret_cast<float*>(to), values.a);
    Vec::store(reinterpret_cast<float*>(to + 8), values.b);
  }

  // The levels of 16 codes, in the order of the codes.
  static PISSA_INLINE Vec::Reg2 look_up(const Table& table, uint8x16_t codes) {
    const uint8x16_t low = vqtbl1q_u8(table.low, codes);
    const uint8x16_t high = vqtbl1q_u8(table.high, codes);
    return {vreinterpretq_f32_u8(vzip1q_u8(low, high)), vreinterpretq_f32_u8(vzip2q_u8(low, high))};
  }

 private:
  static PISSA_INLINE Table rounded(const Vec::Table& table) {
    uint8x16_t eight[2];
    for (int i = 0; i < 2; ++i) {
      const Vec::Reg first = vreinterpretq_f32_u8(table.levels.val[2 * i]);
      const Vec::Reg second = vreinterpretq_f32_u8(table.levels.val[2 * i + 1]);
      eight[i] = vreinterpretq_u8_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(first), second));
    }
    return {vuzp1q_u8(eight[0], eight[1]), vuzp2q_u8(eight[0], eight[1])};
  }
};

}  // namespace pissa::cpu::PISSA_ISA
