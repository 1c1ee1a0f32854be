// NF4 inside a kernel: tables, scales, levels. Included by .cu files only.
#pragma once

#include <cstdint>

#include "pissa/core/nf4.h"
#include "pissa/cuda/device.h"

namespace pissa::cuda {
namespace {

struct DynamicMap {
  float value[256];
};
struct Nf4Levels {
  float value[16];
};
template <class Table, std::size_t n>
constexpr Table table_of(const float (&values)[n]) {
  Table table{};
  for (std::size_t i = 0; i < n; ++i) table.value[i] = values[i];
  return table;
}

// In global memory, where the caches keep them: threads of a warp read different entries, one after the other in
// constant memory.
__device__ const DynamicMap kDeviceDynamicMap = table_of<DynamicMap>(kDynamicMap);
__device__ const Nf4Levels kDeviceNf4Levels = table_of<Nf4Levels>(kNf4Levels);
__device__ const Nf4Search kDeviceNf4Search = kNf4Search;

/// Scale of the block `block` of the flattened matrix.
__device__ __forceinline__ float nf4_scale(const Nf4Scales& scales, std::int64_t block) {
  if (scales.absmax) return scales.absmax[block];
  const float product = kDeviceDynamicMap.value[scales.absmax8[block]] * scales.nested_absmax[block / kNestedBlocksize];
  return product + *scales.offset;
}

/// A lane's entry of the table that a warp holds in registers: level i in lanes i and i + 16.
__device__ __forceinline__ float nf4_lane_level() { return kDeviceNf4Levels.value[threadIdx.x % 16]; }

/// Level of a code, from the lane that has it: one shuffle, no memory. All lanes take part. Bits above the code do not
/// matter: the shuffle takes the lowest five, and the fifth chooses between two lanes with the same level.
__device__ __forceinline__ float nf4_level(float lane_level, unsigned code) {
  return __shfl_sync(kAllLanes, lane_level, static_cast<int>(code));
}

/// The eight levels of a word of codes; in each byte the high nibble comes first.
__device__ __forceinline__ void nf4_levels(float lane_level, unsigned codes, float (&levels)[kGroup]) {
#pragma unroll
  for (int byte = 0; byte < 4; ++byte) {
    levels[2 * byte] = nf4_level(lane_level, codes >> (8 * byte + 4));
    levels[2 * byte + 1] = nf4_level(lane_level, codes >> (8 * byte));
  }
}

}  // namespace
}  // namespace pissa::cuda
