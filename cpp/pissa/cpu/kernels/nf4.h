// NF4 codes. Included only by kernels.cc.
#pragma once

#include "pissa/core/nf4.h"
#include "pissa/cpu/kernels/four_bits.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

struct Nf4 : PackedPairs<Format::nf4> {
  static void quantize(const float* values, std::int64_t count, std::int64_t blocksize, float, std::uint8_t* codes,
                       float* absmax);
  static PISSA_INLINE float nearest(float value, float scale, std::uint8_t& code);
};

void Nf4::quantize(const float* values, std::int64_t count, std::int64_t blocksize, float, std::uint8_t* codes,
                   float* absmax) {
  // Computes the maxima of some blocks before their codes, so that none waits for a division.
  constexpr std::int64_t kBlocks = 16;
  float factors[kBlocks];
  const std::int64_t whole = count / blocksize;
  for (std::int64_t first = 0; first < whole; first += kBlocks) {
    const std::int64_t blocks = smaller(kBlocks, whole - first);
    const float* from = values + first * blocksize;
    for (std::int64_t j = 0; j < blocks; ++j) absmax[first + j] = max_abs(from + j * blocksize, blocksize);
    for (std::int64_t j = 0; j < blocks; ++j) factors[j] = 1.0f / nf4_divisor(absmax[first + j]);
    for (std::int64_t j = 0; j < blocks; ++j, from += blocksize) {
      const Vec::Reg factor = Vec::broadcast(factors[j]);
      for (std::int64_t i = 0; i < blocksize; i += kWidth, codes += kWidth / 2) {
        Vec::store_codes(codes, Vec::mul(Vec::load(from + i), factor), kNf4Search);
      }
    }
  }
  // bitsandbytes multiplies whole blocks by 1 / absmax and divides the short last one; the codes can differ.
  const float* rest = values + whole * blocksize;
  const std::int64_t length = count - whole * blocksize;
  if (length == 0) return;
  const float divisor = nf4_divisor(max_abs(rest, length));
  absmax[whole] = divisor;
  for (std::int64_t i = 0; i < length; i += 2) {  // an odd last element is paired with 0
    const float partner = i + 1 < length ? rest[i + 1] : 0.0f;
    *codes++ = static_cast<std::uint8_t>(nf4_code(rest[i] / divisor) << 4 | nf4_code(partner / divisor));
  }
}

PISSA_INLINE float Nf4::nearest(float value, float scale, std::uint8_t& code) {
  const float scaled = over_scale(value, scale);
  const float clamped = scaled > -1.0f ? (scaled < 1.0f ? scaled : 1.0f) : -1.0f;
  const int cell = static_cast<int>(Nf4Search::kFactor * clamped + Nf4Search::kShift);
  code = static_cast<std::uint8_t>(kNf4Search.base[cell] + (clamped > kNf4Search.threshold[cell]));
  return kNf4Levels[code] * scale;
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
