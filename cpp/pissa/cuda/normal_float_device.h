// NF3 and NF2 inside a kernel. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/core/normal_float.h"
#include "pissa/cuda/scales_device.h"

namespace pissa::cuda {
namespace {

template <Format format>
__device__ const Table<1 << info(format).bits> kDeviceLevels = table_of(NormalFloat<format>::kLevels);

template <Format format>
struct FewBits {
  static constexpr Format kFormat = format;
  static constexpr int kBits = info(format).bits;
  static constexpr unsigned kMask = (1u << kBits) - 1;
  using Scaling = NormalScaling;
  struct Octet {  // the codes of kOctet neighbours
    std::uint8_t byte[kBits];
  };
  struct Line {  // the codes of kLine neighbours
    unsigned word[kBits];
  };

  /// An element from its level and its block's scale.
  static __device__ __forceinline__ float element(float level, float scale) { return level * scale; }
  static __device__ __forceinline__ float level_at(const void* data, std::int64_t at) {
    const auto* codes = static_cast<const std::uint8_t*>(data);
    const int shift = static_cast<int>(at * kBits % 8);
    unsigned word = codes[at * kBits / 8];
    if (shift + kBits > 8) word |= static_cast<unsigned>(codes[at * kBits / 8 + 1]) << 8;
    return kDeviceLevels<format>.value[word >> shift & kMask];
  }

  /// Eight codes, from the lowest bit on.
  static __device__ __forceinline__ Octet packed(const unsigned (&codes)[kOctet]) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) word |= codes[i] << (kBits * i);
    Octet octet;
#pragma unroll
    for (int i = 0; i < kBits; ++i) octet.byte[i] = static_cast<std::uint8_t>(word >> (8 * i));
    return octet;
  }

  struct Encoder {
    static __device__ __forceinline__ unsigned code(float scaled) {
      unsigned code = 0;
#pragma unroll
      for (int i = 0; i < static_cast<int>(kMask); ++i) {
        code += scaled > (kDeviceLevels<format>.value[i] + kDeviceLevels<format>.value[i + 1]) / 2;
      }
      return code;
    }
  };

  /// The level nearest to a value, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    code = Encoder::code(over_scale(value, scale));
    return kDeviceLevels<format>.value[code] * scale;
  }

  class Decoder {
   public:
    __device__ __forceinline__ void levels(const Octet& codes, float (&values)[kOctet]) const {
      unsigned word = 0;
#pragma unroll
      for (int i = 0; i < kBits; ++i) word |= static_cast<unsigned>(codes.byte[i]) << (8 * i);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = kDeviceLevels<format>.value[word >> (kBits * i) & kMask];
    }
    /// Elements [4 * i, 4 * i + 4) of a line.
    __device__ __forceinline__ void four_levels(const Line& codes, int i, float (&values)[4]) const {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bit = (4 * i + j) * kBits;
        unsigned word = codes.word[bit / 32] >> (bit % 32);
        if (bit % 32 + kBits > 32) word |= codes.word[bit / 32 + 1] << (32 - bit % 32);
        values[j] = kDeviceLevels<format>.value[word & kMask];
      }
    }
  };
};

}  // namespace
}  // namespace pissa::cuda
