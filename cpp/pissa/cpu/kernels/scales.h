// Scales of quantised blocks, in any storage format. Included only by kernels.cc.
#pragma once

#include "pissa/core/fp8.h"
#include "pissa/core/nested_scales.h"
#include "pissa/cpu/kernels/dense.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// The scale of one block.
PISSA_INLINE float block_absmax(const Scales& scales, std::int64_t block) {
  if (scales.absmax) return scales.absmax[block];
  if (scales.absmax16) return widen_bf16(scales.absmax16[block]);
  const std::uint8_t byte = scales.absmax8[block];
  if (scales.nested_absmax) {
    return kDynamicMap[byte] * scales.nested_absmax[block / kNestedBlocksize] + *scales.offset;
  }
  return scales.levels ? scales.levels[byte] : e8m0_value(byte);
}

// The scales of blocks [first, first + count).
void decode_absmax(const Scales& scales, std::int64_t first, std::int64_t count, float* to) {
  if (scales.absmax) {
    __builtin_memcpy(to, scales.absmax + first, count * sizeof *to);
    return;
  }
  if (scales.absmax16) return decode_bf16(scales.absmax16 + first, count, to);
  std::int64_t i = 0;
  if (scales.nested_absmax) {
    const Vec::Reg offset = Vec::broadcast(*scales.offset);
    while (i < count) {
      const std::int64_t nested_block = (first + i) / kNestedBlocksize;
      const std::int64_t run_end = smaller(count, (nested_block + 1) * kNestedBlocksize - first);
      const Vec::Reg nested_absmax = Vec::broadcast(scales.nested_absmax[nested_block]);
      for (; i + kWidth <= run_end; i += kWidth) {
        const Vec::Reg levels = Vec::gather(kDynamicMap, scales.absmax8 + first + i);
        Vec::store(to + i, Vec::add(Vec::mul(levels, nested_absmax), offset));
      }
      for (; i < run_end; ++i) to[i] = block_absmax(scales, first + i);
    }
  } else if (scales.levels) {
    for (; i + kWidth <= count; i += kWidth) Vec::store(to + i, Vec::gather(scales.levels, scales.absmax8 + first + i));
  } else {
    for (; i < count; ++i) to[i] = e8m0_value(scales.absmax8[first + i]);
  }
  for (; i < count; ++i) to[i] = block_absmax(scales, first + i);
}

// Prefetches the scale of a block.
PISSA_INLINE void prefetch_scale(const Scales& scales, std::int64_t block) {
  if (scales.absmax) __builtin_prefetch(scales.absmax + block);
  else if (scales.absmax16) __builtin_prefetch(scales.absmax16 + block);
  else __builtin_prefetch(scales.absmax8 + block);
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
