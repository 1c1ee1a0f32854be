// NF4 quantisation of whole blocks. Included by kernels.cc only.
#pragma once

#include "reduce.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr std::int64_t kMaxBlocksize = 4096;

void nf4_quantize(const float* values, std::int64_t count, std::int64_t blocksize, std::uint8_t* codes, float* absmax) {
  std::uint8_t block_codes[kMaxBlocksize + 1];
  for (std::int64_t first = 0; first < count; first += blocksize) {
    const std::int64_t length = smaller(blocksize, count - first);
    const float* block = values + first;
    const float largest = max_abs(block, length);
    const float divisor = largest > kSmallestAbsmax ? largest : kSmallestAbsmax;
    // bitsandbytes multiplies whole blocks by 1 / absmax and divides the short last one; the codes can differ.
    std::int64_t i = 0;
    if (length == blocksize) {
      const float factor = 1.0f / divisor;
      for (; i < length; i += kWidth) {
        Vec::store_codes(block_codes + i, Vec::mul(Vec::load(block + i), Vec::broadcast(factor)), kNf4Thresholds.value);
      }
    }
    for (; i < length; ++i) block_codes[i] = nf4_code(block[i] / divisor);
    *absmax++ = length == blocksize ? largest : divisor;
    block_codes[length] = nf4_code(0.0f);  // the partner of an odd last element
    for (i = 0; i < length; i += 2) *codes++ = static_cast<std::uint8_t>(block_codes[i] << 4 | block_codes[i + 1]);
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
