// FP8 inside a kernel. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/core/fp8.h"
#include "pissa/cuda/bytes_device.h"
#include "pissa/cuda/scales_device.h"

namespace pissa::cuda {
namespace {

struct E4m3 {
  /// As e4m3_value, in fewer instructions: a GPU multiplies subnormals as fast as any number.
  static __device__ __forceinline__ float of(unsigned word) {
    const unsigned magnitude = word & 0x7fu;
    const float size = magnitude == 0x7fu ? __uint_as_float(0x7fc00000u) : __uint_as_float(magnitude << 20) * 0x1p120f;
    return __uint_as_float(__float_as_uint(size) | (word & 0x80u) << 24);
  }
  /// From sm_89 on one instruction, by way of two halves, which are exact, for twelve.
  static __device__ __forceinline__ void two(unsigned word, float& first, float& second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    unsigned halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<unsigned short>(word)));
    unpack_halves<Format::f16>(halves, first, second);
#else
    first = of(word);
    second = of(word >> 8);
#endif
  }
};

struct Fp8 : Bytes<E4m3> {
  static constexpr Format kFormat = Format::fp8;

  /// An element from its code's number and its tile's scale.
  static __device__ __forceinline__ float element(float number, float scale) { return number * scale; }

  struct Scaling : Division {
    __device__ __forceinline__ Scaling(float largest, bool, const float*) : Division{e4m3_scale(largest)} {}
  };

  struct Encoder {
    static __device__ __forceinline__ unsigned code(float scaled) { return e4m3_code(scaled); }
  };

  /// The element nearest to a value, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    code = Encoder::code(over_scale(value, scale));
    return E4m3::of(code) * scale;
  }
};

}  // namespace
}  // namespace pissa::cuda
