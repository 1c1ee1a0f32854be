// Codes of a byte inside a kernel. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/cuda/device.h"

namespace pissa::cuda {
namespace {

/// What formats with such codes have in common. Number::of gives the number of the lowest byte of a word, Number::two
/// those of the two lowest.
template <class Number>
struct Bytes {
  using Octet = uint2;  // the codes of kOctet neighbours
  struct Line {         // the codes of kLine neighbours
    uint4 half[2];
  };

  static __device__ __forceinline__ float level_at(const void* data, std::int64_t at) {
    return Number::of(static_cast<const std::uint8_t*>(data)[at]);
  }

  /// Eight codes.
  static __device__ __forceinline__ Octet packed(const unsigned (&codes)[kOctet]) {
    unsigned words[2] = {};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) words[i / 4] |= codes[i] << (8 * (i % 4));
    return make_uint2(words[0], words[1]);
  }

  class Decoder {
   public:
    __device__ __forceinline__ void levels(const Octet& codes, float (&values)[kOctet]) const {
#pragma unroll
      for (int i = 0; i < kOctet; i += 2) {
        Number::two((i < 4 ? codes.x : codes.y) >> (8 * (i % 4)), values[i], values[i + 1]);
      }
    }
    /// Elements [4 * i, 4 * i + 4) of a line.
    __device__ __forceinline__ void four_levels(const Line& codes, int i, float (&values)[4]) const {
      const uint4& half = codes.half[i / 4];
      const unsigned word = i % 4 == 0 ? half.x : i % 4 == 1 ? half.y : i % 4 == 2 ? half.z : half.w;
#pragma unroll
      for (int j = 0; j < 4; j += 2) Number::two(word >> (8 * j), values[j], values[j + 1]);
    }
  };
};

}  // namespace
}  // namespace pissa::cuda
