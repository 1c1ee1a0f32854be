// NF4 inside a kernel. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/core/nf4.h"
#include "pissa/cuda/scales_device.h"

namespace pissa::cuda {
namespace {

__device__ const Table<16> kDeviceNf4Levels = table_of(kNf4Levels);
__device__ const Nf4Search kDeviceNf4Search = kNf4Search;

/// What a block's elements are divided by.
struct Nf4Divisors {
  static __device__ __forceinline__ float divisor(float largest) { return nf4_divisor(largest); }
  static __device__ __forceinline__ float factor(float divisor) { return 1.0f / divisor; }
};

struct Nf4 {
  static constexpr Format kFormat = Format::nf4;
  using Octet = unsigned;  // the codes of kOctet neighbours
  using Line = uint4;      // the codes of kLine neighbours

  /// An element from its level and its block's scale.
  static __device__ __forceinline__ float element(float level, float scale) { return level * scale; }
  static __device__ __forceinline__ float level_at(const void* data, std::int64_t at) {
    const unsigned codes = static_cast<const std::uint8_t*>(data)[at / 2];
    return kDeviceNf4Levels.value[(at % 2 == 0 ? codes >> 4 : codes) & 15u];
  }

  /// Eight codes, the first of a pair in the high nibble.
  static __device__ __forceinline__ Octet packed(const unsigned (&codes)[kOctet]) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) word |= codes[i] << (4 * (i ^ 1));
    return word;
  }

  /// The level nearest to a value, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    const float clamped = fminf(fmaxf(nf4_scaled(value, scale), -1.0f), 1.0f);
    const int cell = static_cast<int>(clamped * Nf4Search::kFactor + Nf4Search::kShift);
    code = static_cast<unsigned>(kDeviceNf4Search.base[cell] + (clamped > kDeviceNf4Search.threshold[cell]));
    return kDeviceNf4Levels.value[code] * scale;
  }

  /// The levels, in the registers of a warp: level i in lanes i and i + 16. All lanes take part in every call.
  class Decoder {
   public:
    __device__ __forceinline__ Decoder() : lane_level_(kDeviceNf4Levels.value[threadIdx.x % 16]) {}

    /// In each byte the high nibble comes first.
    __device__ __forceinline__ void levels(Octet codes, float (&values)[kOctet]) const {
#pragma unroll
      for (int byte = 0; byte < 4; ++byte) {
        values[2 * byte] = level(codes >> (8 * byte + 4));
        values[2 * byte + 1] = level(codes >> (8 * byte));
      }
    }
    /// Elements [4 * i, 4 * i + 4) of a line.
    __device__ __forceinline__ void four_levels(const Line& codes, int i, float (&values)[4]) const {
      const unsigned word = i / 2 == 0 ? codes.x : i / 2 == 1 ? codes.y : i / 2 == 2 ? codes.z : codes.w;
      const unsigned pairs = word >> (i % 2 * 16);  // two bytes, four codes
      values[0] = level(pairs >> 4);
      values[1] = level(pairs);
      values[2] = level(pairs >> 12);
      values[3] = level(pairs >> 8);
    }

   private:
    // From the lane that has it: one shuffle, no memory. Bits above the code do not matter: the shuffle takes the
    // lowest five, and the fifth chooses between two lanes with the same level.
    __device__ __forceinline__ float level(unsigned code) const {
      return __shfl_sync(kAllLanes, lane_level_, static_cast<int>(code));
    }
    float lane_level_;
  };

  /// A warp's table for the search of codes. All lanes take part.
  class Encoder : public Nf4Divisors {
   public:
    __device__ __forceinline__ Encoder()
        : threshold_(kDeviceNf4Search.threshold[threadIdx.x % kWarp]),
          base_(kDeviceNf4Search.base[threadIdx.x % kWarp]) {}

    /// Of elements divided by their block's absmax.
    __device__ __forceinline__ Octet codes(const float (&scaled)[kOctet]) const {
      unsigned each[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) each[i] = code(scaled[i]);
      return packed(each);
    }

   private:
    __device__ __forceinline__ unsigned code(float scaled) const {
      const int cell = static_cast<int>(fmaf(scaled, Nf4Search::kFactor, Nf4Search::kShift));
      const float threshold = __shfl_sync(kAllLanes, threshold_, cell);
      const int base = __shfl_sync(kAllLanes, base_, cell);
      return static_cast<unsigned>(base + (scaled > threshold));
    }
    float threshold_;
    int base_;
  };
};

}  // namespace
}  // namespace pissa::cuda
