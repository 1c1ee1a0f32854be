// NEON of AArch64, where every processor has it.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "pissa/core/nf4.h"
#include "pissa/core/types.h"

namespace pissa::cpu::PISSA_ISA {

struct Vec {
  using Reg = float32x4_t;
  using Reg64 = float64x2_t;
  static constexpr int kWidth = 4;
  static constexpr int kRegisters = 32;
  static constexpr int kRows = 12;
  static constexpr bool kByLane = true;
  static constexpr bool kLoadsLanes = false;

  static PISSA_INLINE Reg zero() { return vdupq_n_f32(0.0f); }
  static PISSA_INLINE Reg broadcast(float value) { return vdupq_n_f32(value); }
  static PISSA_INLINE Reg load(const float* from) { return vld1q_f32(from); }
  static PISSA_INLINE void store(float* to, Reg value) { vst1q_f32(to, value); }
  static PISSA_INLINE Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static PISSA_INLINE float reduce_add(Reg a) { return vaddvq_f32(a); }
  static PISSA_INLINE float reduce_max_bits(Reg a) {
    return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32(vmaxvq_u32(vreinterpretq_u32_f32(a)))), 0);
  }
  static PISSA_INLINE Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static PISSA_INLINE Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  template <int lane>
  static PISSA_INLINE Reg fma_lane(Reg a, Reg b, Reg c) {
    return vfmaq_laneq_f32(c, b, a, lane);
  }
  static PISSA_INLINE Reg max_bits(Reg a, Reg b) {
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
  }
  static PISSA_INLINE Reg abs(Reg a) { return vabsq_f32(a); }
  static PISSA_INLINE void store_codes(std::uint8_t* to, Reg value, const Nf4Search&) {
    uint32x4_t code = vdupq_n_u32(0);
    for (int i = 0; i < 15; ++i) {
      code = vsubq_u32(code, vcgtq_f32(value, vdupq_n_f32(kNf4Thresholds.value[i])));  // true is -1
    }
    const uint32x2_t words = vreinterpret_u32_u16(vmovn_u32(code));                  // even | odd << 16
    const uint32x2_t pairs = vorr_u32(vshl_n_u32(words, 4), vshr_n_u32(words, 16));  // 16 * even + odd, and more above
    to[0] = static_cast<std::uint8_t>(vget_lane_u32(pairs, 0));
    to[1] = static_cast<std::uint8_t>(vget_lane_u32(pairs, 1));
  }
  static PISSA_INLINE Reg load_i8(const std::int8_t* from) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_4_bytes(from))))));
  }
  // Places sign, exponent and fraction as in f16: the number divided by the ratio of biases, 2^(15 - 7). Not NaN.
  static PISSA_INLINE Reg load_f8(const std::uint8_t* from) {
    const int16x4_t codes = vget_low_s16(vmovl_s8(vreinterpret_s8_u8(load_4_bytes(from))));
    const uint16x4_t bits = vand_u16(vshl_n_u16(vreinterpret_u16_s16(codes), 7), vdup_n_u16(0xbf80));
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  }
  static PISSA_INLINE Reg load_f16(const std::uint16_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
  }
  static PISSA_INLINE float load_half(const void* from) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
  }
  static PISSA_INLINE void store_f16(std::uint16_t* to, Reg value) {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(value)));
  }

  static PISSA_INLINE Reg64 zero64() { return vdupq_n_f64(0.0); }
  static PISSA_INLINE Reg64 load64(const float* from) { return vcvt_f64_f32(vld1_f32(from)); }
  static PISSA_INLINE Reg64 fma64(Reg64 a, Reg64 b, Reg64 c) { return vfmaq_f64(c, a, b); }
  static PISSA_INLINE void store64(double* to, Reg64 value) { vst1q_f64(to, value); }

  static PISSA_INLINE Reg gather(const float* map, const std::uint8_t* indices) {
    return Reg{map[indices[0]], map[indices[1]], map[indices[2]], map[indices[3]]};
  }

  struct Reg2 {
    Reg a, b;
  };
  static constexpr int kMostBlocks = 1;
  struct Table {
    uint8x16x4_t levels;
  };
  template <int blocks>
  static PISSA_INLINE Table table(const float* levels, const float* scales) {
    Table scaled;
    for (int i = 0; i < 4; ++i) {
      scaled.levels.val[i] = vreinterpretq_u8_f32(mul(load(levels + 4 * i), broadcast(*scales)));
    }
    return scaled;
  }
  static PISSA_INLINE Table table_from(const float* levels, float scale, float minimum) {
    Table shifted;
    for (int i = 0; i < 4; ++i) {
      shifted.levels.val[i] = vreinterpretq_u8_f32(fma(load(levels + 4 * i), broadcast(scale), broadcast(minimum)));
    }
    return shifted;
  }
  static PISSA_INLINE Reg2 decode_split(const Table& table, const std::uint8_t* bytes) {
    const uint8x16_t four_times = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    const uint8x16_t byte_of_level = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8x16_t codes = vqtbl1q_u8(vcombine_u8(load_4_bytes(bytes), vdup_n_u8(0)), four_times);
    const uint8x16_t high = vsliq_n_u8(byte_of_level, vshrq_n_u8(codes, 4), 2);  // 4 * code + byte
    const uint8x16_t low = vsliq_n_u8(byte_of_level, vandq_u8(codes, vdupq_n_u8(15)), 2);
    return {vreinterpretq_f32_u8(vqtbl4q_u8(table.levels, high)), vreinterpretq_f32_u8(vqtbl4q_u8(table.levels, low))};
  }
  static PISSA_INLINE Reg2 interleave(Reg2 split) {
    return {vzip1q_f32(split.a, split.b), vzip2q_f32(split.a, split.b)};
  }

  static PISSA_INLINE void transpose(Reg (&row)[4]) {
    const float64x2_t even[] = {vreinterpretq_f64_f32(vtrn1q_f32(row[0], row[1])),
                                vreinterpretq_f64_f32(vtrn1q_f32(row[2], row[3]))};
    const float64x2_t odd[] = {vreinterpretq_f64_f32(vtrn2q_f32(row[0], row[1])),
                               vreinterpretq_f64_f32(vtrn2q_f32(row[2], row[3]))};
    row[0] = vreinterpretq_f32_f64(vtrn1q_f64(even[0], even[1]));
    row[1] = vreinterpretq_f32_f64(vtrn1q_f64(odd[0], odd[1]));
    row[2] = vreinterpretq_f32_f64(vtrn2q_f64(even[0], even[1]));
    row[3] = vreinterpretq_f32_f64(vtrn2q_f64(odd[0], odd[1]));
  }

  static PISSA_INLINE uint8x8_t load_4_bytes(const void* from) {
    std::uint32_t bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return vreinterpret_u8_u32(vdup_n_u32(bytes));
  }
};

}  // namespace pissa::cpu::PISSA_ISA
