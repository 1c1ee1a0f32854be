// Codes of four bits inside a kernel: decoded; and, of all formats but NF4 (nf4_device.h), made. Included by .cu files
// only.
#pragma once

#include <cstdint>

#include "pissa/core/four_bits.h"
#include "pissa/cuda/scales_device.h"

namespace pissa::cuda {
namespace {

template <Format format>
__device__ const Table<16> kDeviceFourBits = table_of(FourBits<format>::kLevels);

// What all of them have in common.
template <Format format>
struct PackedPairs {
  static constexpr Format kFormat = format;
  using Octet = unsigned;  // the codes of kOctet neighbours
  using Line = uint4;      // the codes of kLine neighbours

  /// An element from its level and its block's scale.
  static __device__ __forceinline__ float element(float level, float scale) { return level * scale; }
  static __device__ __forceinline__ float level_at(const void* data, std::int64_t at) {
    return level_of(static_cast<const std::uint8_t*>(data)[at / 2] >> place(static_cast<int>(at % 2)) & 15);
  }
  static __device__ __forceinline__ float level_of(unsigned code) { return kDeviceFourBits<format>.value[code]; }

  /// Eight codes.
  static __device__ __forceinline__ Octet packed(const unsigned (&codes)[kOctet]) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) word |= codes[i] << place(i);
    return word;
  }

  /// The levels, in the registers of a warp: level i in lanes i and i + 16. All lanes take part in every call.
  class Decoder {
   public:
    __device__ __forceinline__ Decoder() : lane_level_(level_of(threadIdx.x % 16)) {}

    __device__ __forceinline__ void levels(Octet codes, float (&values)[kOctet]) const {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values[i] = level(codes >> place(i));
    }
    /// Elements [4 * i, 4 * i + 4) of a line.
    __device__ __forceinline__ void four_levels(const Line& codes, int i, float (&values)[4]) const {
      const unsigned word = i / 2 == 0 ? codes.x : i / 2 == 1 ? codes.y : i / 2 == 2 ? codes.z : codes.w;
      const unsigned pairs = word >> (i % 2 * 16);  // two bytes, four codes
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] = level(pairs >> place(j));
    }

   private:
    // From the lane that has it: one shuffle, no memory. Bits above the code do not matter: the shuffle takes the
    // lowest five, and the fifth chooses between two lanes with the same level. Of E2M1 alone some GPUs have an
    // instruction; code for it runs on no later one (sm_100a, sm_120a).
    __device__ __forceinline__ float level(unsigned code) const {
      return __shfl_sync(kAllLanes, lane_level_, static_cast<int>(code));
    }
    float lane_level_;
  };

 private:
  // The lowest bit of a code in its word.
  static __device__ __forceinline__ int place(int i) { return 4 * (FourBits<format>::kLowFirst ? i : i ^ 1); }
};

// A format whose scales and codes FourBits defines.
template <Format format>
struct Grouped : PackedPairs<format> {
  struct Scaling : Division {
    __device__ __forceinline__ Scaling(float largest, bool, const float* global)
        : Division{FourBits<format>::scale(largest, global ? *global : 1.0f)} {}
  };

  struct Encoder {
    static __device__ __forceinline__ unsigned code(float scaled) { return FourBits<format>::code(scaled); }
  };

  /// The element nearest to a value, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    code = Encoder::code(over_scale(value, scale));
    return PackedPairs<format>::level_of(code) * scale;
  }
};

}  // namespace
}  // namespace pissa::cuda
