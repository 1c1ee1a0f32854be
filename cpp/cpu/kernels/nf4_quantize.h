// NF4 quantisation of whole blocks. Included by kernels.cc only.
#pragma once

#include "reduce.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

// Codes of one block whose elements, divided by absmax, are given a vector at a time.
void nf4_codes(const float* values, std::int64_t count, float factor, bool divide, float* codes) {
  const Vec::Reg one = Vec::broadcast(1.0f);
  const Vec::Reg minus_one = Vec::broadcast(-1.0f);
  std::int64_t i = 0;
  for (; !divide && i + kWidth <= count; i += kWidth) {
    const Vec::Reg scaled = Vec::max(Vec::min(Vec::mul(Vec::load(values + i), Vec::broadcast(factor)), one), minus_one);
    Vec::Reg code = Vec::zero();
    for (int t = 0; t < 15; ++t) code = Vec::count_above(scaled, Vec::broadcast(kNf4Thresholds.value[t]), code);
    Vec::store(codes + i, code);
  }
  for (; i < count; ++i) codes[i] = nf4_code(divide ? values[i] / factor : values[i] * factor);
}

void nf4_quantize(const float* values, std::int64_t count, std::int64_t blocksize, std::uint8_t* codes, float* absmax) {
  constexpr std::int64_t kMaxBlocksize = 4096;
  float block_codes[kMaxBlocksize + 1];
  for (std::int64_t first = 0; first < count; first += blocksize) {
    const std::int64_t length = smaller(blocksize, count - first);
    const float largest = max_abs(values + first, length);
    const float divisor = largest > kSmallestAbsmax ? largest : kSmallestAbsmax;
    // bitsandbytes multiplies whole blocks by 1 / absmax and divides the short last one; the codes can differ.
    const bool whole = length == blocksize;
    *absmax++ = whole ? largest : divisor;
    nf4_codes(values + first, length, whole ? 1.0f / divisor : divisor, !whole, block_codes);
    block_codes[length] = nf4_code(0.0f);  // the partner of an odd last element
    for (std::int64_t i = 0; i < length; i += 2) {
      *codes++ =
          static_cast<std::uint8_t>((static_cast<int>(block_codes[i]) << 4) | static_cast<int>(block_codes[i + 1]));
    }
  }
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
