// bf16 by its bits, on every instruction set.
#pragma once

#include <cstdint>

#include "pissa/core/types.h"

namespace pissa::cpu::PISSA_ISA {

// The bits of a bf16, also where it shares memory with the words of a panel.
using Half = std::uint16_t __attribute__((may_alias));

PISSA_INLINE float widen_bf16(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

PISSA_INLINE std::uint16_t round_to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

// An integer of up to eight bits, as many as a bf16's significand has, so that there is nothing to round.
PISSA_INLINE constexpr std::uint16_t exact_bf16(int value) {
  return static_cast<std::uint16_t>(bits_of(static_cast<float>(value)) >> 16);
}

}  // namespace pissa::cpu::PISSA_ISA
