// Softmax of a row: a token's sums over logits, and attention's weights and their gradient. Included only by
// kernels.cc.
//
// Plain loops over kLanes numbers, which compilers turn into vectors of any width. The order of the sums, and therefore
// their bits, are the same for every instruction set.
#pragma once

#include "pissa/cpu/kernels/dense.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr std::int64_t kLanes = 16;

// exp(x) for x <= 0, within 2 ulp; below -87 it is exp(-87), 1.6e-38. Reduction and polynomial are those of Cephes'
// expf.
PISSA_INLINE float exp_of(float x) {
  constexpr float kRounding = 0x1.8p23f;  // added to a number, it leaves its nearest integer in the lowest bits
  const float clipped = x < -87.0f ? -87.0f : x;
  const float shifted = clipped * 1.44269504f + kRounding;
  const float n = shifted - kRounding;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  std::uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Sums of values(i)[0], [1], ... over all i: runs are summed in f32, and the sums of runs in f64.
template <int n>
struct Sums {
  double total[n] = {};

  template <class F>
  PISSA_INLINE Sums(std::int64_t count, F add) {
    constexpr std::int64_t kRun = 1024;
    for (std::int64_t first = 0; first < count; first += kRun) {
      const std::int64_t end = smaller(first + kRun, count);
      float lanes[n][kLanes] = {};
      std::int64_t i = first;
      for (; i + kLanes <= end; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane, lanes);
      }
      for (; i < end; ++i) add(i, i % kLanes, lanes);
      for (int sum = 0; sum < n; ++sum) {
        for (const float lane : lanes[sum]) total[sum] += double{lane};
      }
    }
  }
};

// Logits become z.
PISSA_INLINE void scale_logits(float* logits, std::int64_t count, float scale, float cap) {
  if (cap > 0) {
    const float factor = 2.0f * scale / cap;
    for (std::int64_t i = 0; i < count; ++i) {
      const float twice = logits[i] * factor;
      const float e = exp_of(-__builtin_fabsf(twice));  // tanh |t| = (1 - e) / (1 + e) with e = exp(-2 |t|)
      logits[i] = __builtin_copysignf(cap * ((1.0f - e) / (1.0f + e)), twice);
    }
  } else if (scale != 1.0f) {
    for (std::int64_t i = 0; i < count; ++i) logits[i] *= scale;
  }
}

float add_scores(float* logits, std::int64_t count, std::int64_t label, float scale, float cap, bool gradient,
                 ScoreState& state) {
  scale_logits(logits, count, scale, cap);
  float most[kLanes];
  for (float& lane : most) lane = state.largest;
  const Sums<1> all(count, [&](std::int64_t i, std::int64_t lane, auto& sums) {
    most[lane] = logits[i] > most[lane] ? logits[i] : most[lane];
    sums[0][lane] += logits[i];
  });
  float largest = most[0];
  for (const float lane : most) largest = lane > largest ? lane : largest;
  const bool here = label >= 0 && label < count;
  if (here) {
    state.of_label = logits[label];
    logits[label] = -__builtin_inff();
  }
  const float cap_inverse = cap > 0 ? 1.0f / cap : 0.0f;
  const Sums<3> exps(count, [&](std::int64_t i, std::int64_t lane, auto& sums) {
    const float z = logits[i];
    const float less = z - largest < -87.0f ? -87.0f : z - largest;
    const float e = exp_of(less);
    sums[0][lane] += e;
    sums[1][lane] += e * e;
    sums[2][lane] += e * less;
    const float of_cap = z * cap_inverse;
    if (gradient) logits[i] = cap > 0 ? e * (1.0f - of_cap * of_cap) : e;
  });
  if (here) logits[label] = 0.0f;
  return state.add({largest, static_cast<float>(exps.total[0]), static_cast<float>(exps.total[1]),
                    static_cast<float>(exps.total[2]), static_cast<float>(all.total[0])},
                   exp_of);
}

// Masked values are as far below as exp_of allows, and are then set to 0.
PISSA_INLINE void hide(float* row, std::int64_t count, const std::uint8_t* mask, float value) {
  for (std::int64_t i = 0; i < count; ++i) row[i] = mask[i] ? row[i] : value;
}

float softmax_row(float* row, std::int64_t count, const std::uint8_t* mask, float scale, float* share) {
  *share = 0;
  if (count == 0) return -__builtin_inff();
  if (mask || !(scale > 0)) {
    for (std::int64_t i = 0; i < count; ++i) row[i] *= scale;
    if (mask) hide(row, count, mask, -__builtin_inff());
    scale = 1;
  }
  float most[kLanes];
  for (float& lane : most) lane = row[count - 1];  // which is visible
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      most[lane] = row[i + lane] > most[lane] ? row[i + lane] : most[lane];
  }
  for (; i < count; ++i) most[0] = row[i] > most[0] ? row[i] : most[0];
  float largest = most[0];
  for (const float lane : most) largest = lane > largest ? lane : largest;
  largest *= scale;
  const Sums<1> sum(count, [&](std::int64_t at, std::int64_t lane, auto& sums) {
    row[at] = exp_of(row[at] * scale - largest);
    sums[0][lane] += row[at];
  });
  if (mask) hide(row, count, mask, 0.0f);
  *share = static_cast<float>(1.0 / sum.total[0]);
  return largest + __builtin_logf(static_cast<float>(sum.total[0]));
}

void softmax_backward_row(float* row, float* dp, std::int64_t count, const std::uint8_t* mask, float log_sum,
                          float less, float scale) {
  for (std::int64_t i = 0; i < count; ++i) row[i] = exp_of(row[i] * scale - log_sum);
  if (mask) hide(row, count, mask, 0.0f);
  for (std::int64_t i = 0; i < count; ++i) dp[i] = row[i] * (dp[i] - less) * scale;
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
