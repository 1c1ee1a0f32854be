// Scales of quantised blocks inside a kernel: read, in whatever they are stored, and made. Included by .cu files only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pissa/core/fp8.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/nf4.h"
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
/// What it takes from the dynamic map, or from levels, is in L1: a warp asks for few entries at a time.
template <class Codes>
class BlockScales {
 public:
  struct Part {
    float scale = 0.0f;  // of the block; nested: of 256 blocks
    unsigned code = 0;   // its 16 or 8 bits
  };

  /// `shift` is the logarithm of the block size, unless blocks are rows or tiles.
  __device__ __forceinline__ BlockScales(const Scales& scales, int shift)
      : scales_(scales), shift_(shift), offset_(nested() ? *scales.offset : 0.0f) {}

  /// Of the block that (row, col) is in, element `at` of the flattened weight.
  __device__ __forceinline__ Part load(std::int64_t row, std::int64_t col, std::int64_t at) const {
    const std::int64_t block = block_of(row, col, at);
    if (in_f32()) return {scales_.absmax[block]};
    if (in_bf16()) return {0.0f, scales_.absmax16[block]};
    return {nested() ? scales_.nested_absmax[block / kNestedBlocksize] : 0.0f, scales_.absmax8[block]};
  }
  __device__ __forceinline__ float value(const Part& part) const {
    if (in_f32()) return part.scale;
    if (in_bf16()) return __uint_as_float(part.code << 16);
    if (kKind == ScaleKind::e4m3) return scales_.levels[part.code];
    if (!nested()) return e8m0_value(static_cast<std::uint8_t>(part.code));
    const float product = kDeviceDynamicMap.value[part.code] * part.scale;
    return product + offset_;
  }

 private:
  static constexpr ScaleKind kKind = info(Codes::kFormat).scales;

  // What the format fixes is known when the kernel is compiled.
  __device__ __forceinline__ bool in_f32() const {
    if constexpr (kKind == ScaleKind::e8m0 || kKind == ScaleKind::e4m3) return false;
    return kKind == ScaleKind::f32 || scales_.absmax != nullptr;
  }
  __device__ __forceinline__ bool in_bf16() const {
    if constexpr (kKind == ScaleKind::bf16 || kKind == ScaleKind::tiles) return scales_.absmax16 != nullptr;
    return false;
  }
  __device__ __forceinline__ bool nested() const {
    if constexpr (kKind == ScaleKind::nested) return !in_f32();
    return false;
  }
  __device__ __forceinline__ std::int64_t block_of(std::int64_t row, std::int64_t col, std::int64_t at) const {
    if constexpr (kKind == ScaleKind::tiles) {
      std::int64_t rest;
      return divide(row, scales_.rows, rest) * scales_.across + divide(col, scales_.blocksize, rest);
    }
    return info(Codes::kFormat).blocks.by_row() ? row : at >> shift_;
  }

  const Scales& scales_;
  int shift_;
  float offset_;
};

/// NF4's, as bitsandbytes has it: whole blocks are multiplied by a factor, the short last one is divided; the codes can
/// differ.
class NormalScaling {
 public:
  __device__ __forceinline__ NormalScaling(float largest, bool whole, const float*)
      : whole_(whole), divisor_(nf4_divisor(largest)), stored_(whole ? largest : divisor_), factor_(1.0f / divisor_) {}
  __device__ __forceinline__ float stored() const { return stored_; }
  __device__ __forceinline__ void apply(const float (&values)[kOctet], float (&scaled)[kOctet]) const {
    if (whole_) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) scaled[i] = values[i] * factor_;
    } else {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) scaled[i] = values[i] / divisor_;
    }
  }

 private:
  bool whole_;
  float divisor_, stored_, factor_;
};

/// Elements divided by the scale as it is stored.
struct Division {
  float scale;
  __device__ __forceinline__ float stored() const { return scale; }
  __device__ __forceinline__ void apply(const float (&values)[kOctet], float (&scaled)[kOctet]) const {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) scaled[i] = over_scale(values[i], scale);
  }
};

}  // namespace
}  // namespace pissa::cuda
