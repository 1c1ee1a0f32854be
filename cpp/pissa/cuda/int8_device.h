// INT8 inside a kernel. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/core/int8.h"
#include "pissa/cuda/bytes_device.h"

namespace pissa::cuda {
namespace {

struct SignedByte {
  static __device__ __forceinline__ float of(unsigned word) { return static_cast<std::int8_t>(word); }
  static __device__ __forceinline__ void two(unsigned word, float& first, float& second) {
    first = of(word);
    second = of(word >> 8);
  }
};

struct Int8 : Bytes<SignedByte> {
  static constexpr Format kFormat = Format::int8;

  /// An element from its code and its row's scale.
  static __device__ __forceinline__ float element(float code, float scale) { return int8_element(code, scale); }

  /// The element nearest to a value, which may be beyond the largest, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    const float scaled = fminf(fmaxf(value * int8_factor(scale), -kInt8Largest), kInt8Largest);
    const int rounded = __float2int_rn(scaled);
    code = static_cast<unsigned>(rounded) & 255u;
    return int8_element(static_cast<float>(rounded), scale);
  }

  class Scaling {
   public:
    __device__ __forceinline__ Scaling(float largest, bool, const float*)
        : stored_(largest), factor_(int8_factor(largest)) {}
    __device__ __forceinline__ float stored() const { return stored_; }
    __device__ __forceinline__ void apply(const float (&values)[kOctet], float (&scaled)[kOctet]) const {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) scaled[i] = values[i] * factor_;
    }

   private:
    float stored_, factor_;
  };

  struct Encoder {
    static __device__ __forceinline__ unsigned code(float scaled) {
      return static_cast<unsigned>(__float2int_rn(scaled)) & 255u;
    }
  };
};

}  // namespace
}  // namespace pissa::cuda
