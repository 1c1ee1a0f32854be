// NF4 quantisation of whole blocks. Included by kernels.cc only.
#pragma once

#include "reduce.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

void nf4_quantize(const float* values, std::int64_t count, std::int64_t blocksize, std::uint8_t* codes, float* absmax) {
  for (std::int64_t first = 0; first < count; first += blocksize, ++absmax) {
    const float* block = values + first;
    const std::int64_t length = smaller(blocksize, count - first);
    const float largest = max_abs(block, length);
    const float divisor = largest > kSmallestAbsmax ? largest : kSmallestAbsmax;
    // bitsandbytes multiplies whole blocks by 1 / absmax and divides the short last one; the codes can differ.
    if (length == blocksize) {
      *absmax = largest;
      const Vec::Reg factor = Vec::broadcast(1.0f / divisor);
      for (std::int64_t i = 0; i < length; i += kWidth, codes += kWidth / 2) {
        Vec::store_codes(codes, Vec::mul(Vec::load(block + i), factor), kNf4Search);
      }
    } else {
      *absmax = divisor;
      for (std::int64_t i = 0; i < length; i += 2) {  // the partner of an odd last element is 0
        const float partner = i + 1 < length ? block[i + 1] : 0.0f;
        *codes++ = static_cast<std::uint8_t>(nf4_code(block[i] / divisor) << 4 | nf4_code(partner / divisor));
      }
    }
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
