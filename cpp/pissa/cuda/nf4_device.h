// NF4 codes inside a kernel. Included by .cu files only.
#pragma once

#include "pissa/core/nf4.h"
#include "pissa/cuda/four_bits_device.h"

namespace pissa::cuda {
namespace {

__device__ const Nf4Search kDeviceNf4Search = kNf4Search;

struct Nf4 : PackedPairs<Format::nf4> {
  using Scaling = NormalScaling;

  /// The level nearest to a value, and its code.
  static __device__ __forceinline__ float nearest(float value, float scale, unsigned& code) {
    const float clamped = fminf(fmaxf(over_scale(value, scale), -1.0f), 1.0f);
    const int cell = static_cast<int>(clamped * Nf4Search::kFactor + Nf4Search::kShift);
    code = static_cast<unsigned>(kDeviceNf4Search.base[cell] + (clamped > kDeviceNf4Search.threshold[cell]));
    return level_of(code) * scale;
  }

  /// A warp's table for the search of codes. All lanes take part.
  class Encoder {
   public:
    __device__ __forceinline__ Encoder()
        : threshold_(kDeviceNf4Search.threshold[threadIdx.x % kWarp]),
          base_(kDeviceNf4Search.base[threadIdx.x % kWarp]) {}

    __device__ __forceinline__ unsigned code(float scaled) const {
      const int cell = static_cast<int>(fmaf(scaled, Nf4Search::kFactor, Nf4Search::kShift));
      const float threshold = __shfl_sync(kAllLanes, threshold_, cell);
      const int base = __shfl_sync(kAllLanes, base_, cell);
      return static_cast<unsigned>(base + (scaled > threshold));
    }

   private:
    float threshold_;
    int base_;
  };
};

}  // namespace
}  // namespace pissa::cuda
