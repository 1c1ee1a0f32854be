// Gated activations of a run of numbers. Included only by kernels.cc. Plain loops, as in softmax.h.
#pragma once

#include "pissa/cpu/kernels/softmax.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

struct ValueAndSlope {
  float value, slope;
};

// x s(x) with s(x) = 1 / (1 + exp(-x))
struct Silu {
  static PISSA_INLINE ValueAndSlope at(float x) {
    const float e = exp_of(-__builtin_fabsf(x));
    const float share = (x < 0.0f ? e : 1.0f) / (1.0f + e);
    return {x * share, share + x * share * (1.0f - share)};
  }
};

// x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3)
struct GeluTanh {
  static PISSA_INLINE ValueAndSlope at(float x) {
    constexpr float kFactor = 0.797884561f, kCube = 0.044715f;
    const float square = x * x;
    const float u = kFactor * x * (1.0f + kCube * square);
    const float e = exp_of(-2.0f * __builtin_fabsf(u));  // tanh |u| = (1 - e) / (1 + e)
    const float tanh = __builtin_copysignf((1.0f - e) / (1.0f + e), u);
    const float half = 0.5f * (1.0f + tanh);
    return {x * half, half + 0.5f * x * (1.0f - tanh * tanh) * kFactor * (1.0f + 3.0f * kCube * square)};
  }
};

template <class F>
void gated_by(float* gate, const float* up, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) gate[i] = F::at(gate[i]).value * up[i];
}

template <class F>
void gated_backward_by(const float* dy, float* gate, float* up, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const ValueAndSlope f = F::at(gate[i]);
    gate[i] = dy[i] * up[i] * f.slope;
    up[i] = dy[i] * f.value;
  }
}

void gated(float* gate, const float* up, std::int64_t count, Activation activation) {
  if (activation == Activation::silu) gated_by<Silu>(gate, up, count);
  else gated_by<GeluTanh>(gate, up, count);
}

void gated_backward(const float* dy, float* gate, float* up, std::int64_t count, Activation activation) {
  if (activation == Activation::silu) gated_backward_by<Silu>(dy, gate, up, count);
  else gated_backward_by<GeluTanh>(dy, gate, up, count);
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
