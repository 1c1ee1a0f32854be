// Scales of quantised blocks inside a kernel, which may be quantised too. Included by .cu files only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pissa/core/nested_scales.h"
#include "pissa/cuda/device.h"

namespace pissa::cuda {
namespace {

/// A table in global memory, where the caches keep it: threads of a warp read different entries, one after the other in
/// constant memory.
template <std::size_t n>
struct Table {
  float value[n];
};
template <std::size_t n>
constexpr Table<n> table_of(const float (&values)[n]) {
  Table<n> table{};
  for (std::size_t i = 0; i < n; ++i) table.value[i] = values[i];
  return table;
}

__device__ const Table<256> kDeviceDynamicMap = table_of(kDynamicMap);

/// Number of the block that an element is in: `shift` is the logarithm of the block size, unless a block is a row.
template <class Codes>
__device__ __forceinline__ std::int64_t block_of(int shift, std::int64_t row, std::int64_t element) {
  return info(Codes::kFormat).blocks.by_row() ? row : element >> shift;
}

__device__ __forceinline__ float scale_of(const Scales& scales, std::int64_t block) {
  if (scales.absmax) return scales.absmax[block];
  const float product = kDeviceDynamicMap.value[scales.absmax8[block]] * scales.nested_absmax[block / kNestedBlocksize];
  return product + *scales.offset;
}

}  // namespace
}  // namespace pissa::cuda
