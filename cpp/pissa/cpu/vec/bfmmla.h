// BFMMLA, which every processor with the BF16 extension has: products of bf16 pairs, 2 x 4 by 4 x 2 numbers at a time.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cpu/vec/neon.h"

namespace pissa::cpu::PISSA_ISA {

struct Tiles {
  static constexpr bool kMultiply = true;
  static constexpr int kRows = Vec::kRows;
  static constexpr int kDepth = 2;  // words, four numbers

  // Of every two words of a lane, which are `width` apart, one after the other: two lanes are an operand.
  static PISSA_INLINE void arrange(std::int64_t length, int width, std::int64_t strips, std::int64_t stride,
                                   float* to) {
    for (std::int64_t strip = 0; strip < strips; ++strip, to += stride) {
      for (std::int64_t k = 0; k < length; k += kDepth) {
        float* words = to + k * width;
        float32x4_t pairs[2 * kRows / 4];
        for (int i = 0; i < width; i += 4) {
          const float32x4_t one = vld1q_f32(words + i), other = vld1q_f32(words + width + i);
          pairs[i / 2] = vzip1q_f32(one, other);
          pairs[i / 2 + 1] = vzip2q_f32(one, other);
        }
        for (int i = 0; i < width / 2; ++i) vst1q_f32(words + 4 * i, pairs[i]);
      }
    }
  }

  // c[rows, 8] = or += a[rows, length] b[length, 8], in words
  PISSA_INLINE void multiply(std::int64_t rows, std::int64_t length, const float* a, std::int64_t, const float* b,
                             float* c, std::int64_t ld_c, bool accumulate) const {
    if (rows <= 4) multiply_pairs<2>(length, a, b, c, ld_c, accumulate);
    else if (rows <= 8) multiply_pairs<4>(length, a, b, c, ld_c, accumulate);
    else multiply_pairs<6>(length, a, b, c, ld_c, accumulate);
  }

 private:
  // For 2 * pairs rows. A sum is of two rows and two columns.
  template <int pairs>
  static PISSA_INLINE void multiply_pairs(std::int64_t length, const float* a, const float* b, float* c,
                                          std::int64_t ld_c, bool accumulate) {
    float32x4_t sum[pairs][4];
    for (int i = 0; i < pairs; ++i) {
      for (int j = 0; j < 4; ++j) sum[i][j] = vdupq_n_f32(0.0f);
    }
    for (std::int64_t k = 0; k < length; k += kDepth, a += kDepth * kRows, b += kDepth * 8) {
      bfloat16x8_t right[4];
      for (int j = 0; j < 4; ++j) right[j] = vreinterpretq_bf16_f32(vld1q_f32(b + 4 * j));
      for (int i = 0; i < pairs; ++i) {
        const bfloat16x8_t left = vreinterpretq_bf16_f32(vld1q_f32(a + 4 * i));
        for (int j = 0; j < 4; ++j) sum[i][j] = vbfmmlaq_f32(sum[i][j], left, right[j]);
      }
    }
    for (int i = 0; i < pairs; ++i) {
      for (int j = 0; j < 4; j += 2) {
        const float32x4_t rows[] = {vcombine_f32(vget_low_f32(sum[i][j]), vget_low_f32(sum[i][j + 1])),
                                    vcombine_f32(vget_high_f32(sum[i][j]), vget_high_f32(sum[i][j + 1]))};
        for (int row = 0; row < 2; ++row) {
          float* to = c + (2 * i + row) * ld_c + 2 * j;
          vst1q_f32(to, accumulate ? vaddq_f32(vld1q_f32(to), rows[row]) : rows[row]);
        }
      }
    }
  }
};

}  // namespace pissa::cpu::PISSA_ISA
