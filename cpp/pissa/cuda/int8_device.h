// INT8 inside a kernel. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/core/int8.h"
#include "pissa/cuda/scales_device.h"

namespace pissa::cuda {
namespace {

struct Int8 {
  static constexpr Format kFormat = Format::int8;
  using Octet = uint2;  // the codes of kOctet neighbours
  struct Line {         // the codes of kLine neighbours
    uint4 half[2];
  };

  /// An element from its code and its row's scale.
  static __device__ __forceinline__ float element(float code, float scale) { return int8_element(code, scale); }
  static __device__ __forceinline__ float level_at(const void* data, std::int64_t at) {
    return static_cast<const std::int8_t*>(data)[at];
  }

  /// Eight codes.
  static __device__ __forceinline__ Octet packed(const unsigned (&codes)[kOctet]) {
    unsigned words[2] = {};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) words[i / 4] |= codes[i] << (8 * (i % 4));
    return make_uint2(words[0], words[1]);
  }

  /// The element nearest to a value, which may be beyond the largest, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    const float scaled = fminf(fmaxf(value * int8_factor(scale), -kInt8Largest), kInt8Largest);
    const int rounded = __float2int_rn(scaled);
    code = static_cast<unsigned>(rounded) & 255u;
    return int8_element(static_cast<float>(rounded), scale);
  }

  class Decoder {
   public:
    __device__ __forceinline__ void levels(const Octet& codes, float (&values)[kOctet]) const {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = code(i < 4 ? codes.x : codes.y, i % 4);
    }
    /// Elements [4 * i, 4 * i + 4) of a line.
    __device__ __forceinline__ void four_levels(const Line& codes, int i, float (&values)[4]) const {
      const uint4& half = codes.half[i / 4];
      const unsigned word = i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w;
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = code(word, j);
    }

   private:
    static __device__ __forceinline__ float code(unsigned word, int byte) {
      return static_cast<std::int8_t>(word >> (8 * byte));
    }
  };

  class Encoder {
   public:
    static __device__ __forceinline__ float divisor(float largest) { return largest; }
    static __device__ __forceinline__ float factor(float divisor) { return int8_factor(divisor); }

    /// Of elements times their row's factor.
    __device__ __forceinline__ Octet codes(const float (&scaled)[kOctet]) const {
      unsigned each[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) each[i] = static_cast<unsigned>(__float2int_rn(scaled[i])) & 255u;
      return packed(each);
    }
  };
};

}  // namespace
}  // namespace pissa::cuda
