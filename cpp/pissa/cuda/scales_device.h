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

/// The scales of a quantised weight, each in two steps: a thread loads the parts of several before it uses the first.
/// What it takes from the dynamic map is in L1: a warp asks for few entries at a time.
template <class Codes>
class BlockScales {
 public:
  struct Part {
    float scale = 0.0f;  // of the block; nested: of 256 blocks
    int level = 0;       // nested: in the dynamic map
  };

  /// `shift` is the logarithm of the block size, unless a block is a row.
  __device__ __forceinline__ BlockScales(const Scales& scales, int shift)
      : scales_(scales), shift_(shift), offset_(nested() ? *scales.offset : 0.0f) {}

  /// Of the block that an element of the flattened weight is in.
  __device__ __forceinline__ Part load(std::int64_t row, std::int64_t element) const {
    if constexpr (info(Codes::kFormat).blocks.by_row()) return {scales_.absmax[row]};
    const std::int64_t block = element >> shift_;
    if (!nested()) return {scales_.absmax[block]};
    return {scales_.nested_absmax[block / kNestedBlocksize], scales_.absmax8[block]};
  }
  __device__ __forceinline__ float value(const Part& part) const {
    if (!nested()) return part.scale;
    const float product = kDeviceDynamicMap.value[part.level] * part.scale;
    return product + offset_;
  }

 private:
  __device__ __forceinline__ bool nested() const {
    if constexpr (!info(Codes::kFormat).nested) return false;
    return scales_.absmax == nullptr;
  }

  const Scales& scales_;
  int shift_;
  float offset_;
};

}  // namespace
}  // namespace pissa::cuda
