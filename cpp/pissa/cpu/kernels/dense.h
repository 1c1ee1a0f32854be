// Rows of the dense formats as numbers, and numbers rounded to them. Included only by kernels.cc.
#pragma once

#include "pissa/cpu/kernels.h"
#include "pissa/cpu/vec/product.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

constexpr int kWidth = Vec::kWidth;

std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A loop of vectors, because memcpy, called for the kilobyte of a row, takes twice as long.
template <class Element>
PISSA_INLINE void copy_elements(const Element* from, std::int64_t count, Element* to) {
  constexpr std::int64_t kStep = kWidth * sizeof(float) / sizeof(Element);
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Vec::store(reinterpret_cast<float*>(to + i), Vec::load(reinterpret_cast<const float*>(from + i)));
  }
  for (; i < count; ++i) to[i] = from[i];
}

void decode_f16(const std::uint16_t* from, std::int64_t count, float* to) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Vec::store(to + i, Vec::load_f16(from + i));
  if (i == count) return;
  std::uint16_t last[kWidth] = {};
  float values[kWidth];
  __builtin_memcpy(last, from + i, (count - i) * sizeof *from);
  Vec::store(values, Vec::load_f16(last));
  __builtin_memcpy(to + i, values, (count - i) * sizeof *to);
}

void encode_f16(const float* from, std::int64_t count, std::uint16_t* to) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) Vec::store_f16(to + i, Vec::load(from + i));
  if (i == count) return;
  float last[kWidth] = {};
  std::uint16_t values[kWidth];
  __builtin_memcpy(last, from + i, (count - i) * sizeof *from);
  Vec::store_f16(values, Vec::load(last));
  __builtin_memcpy(to + i, values, (count - i) * sizeof *to);
}

void decode_bf16(const std::uint16_t* from, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = widen_bf16(from[i]);
}

// As round_to_bf16, by the instruction where there is one, except for denormals, which it takes for zero.
void encode_bf16(const float* from, std::int64_t count, std::uint16_t* to) {
  std::int64_t i = 0;
#if defined(__AVX512BF16__)
  constexpr std::int64_t kStep = 2 * kWidth;
  for (; i + kStep <= count; i += kStep) {
    const Vec::Reg2 values = {Vec::load(from + i), Vec::load(from + i + kWidth)};
    if (Pairs::has_denormals(values)) {
      for (std::int64_t k = i; k < i + kStep; ++k) to[k] = round_to_bf16(from[k]);
    } else {
      Pairs::store(to + i, values);
    }
  }
#endif
  for (; i < count; ++i) to[i] = round_to_bf16(from[i]);
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
