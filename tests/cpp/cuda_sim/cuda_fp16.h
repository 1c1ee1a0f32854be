// IEEE binary16: 1 bit of sign, 5 of exponent, 10 of fraction.
#pragma once

#include <bit>
#include <cstdint>

struct alignas(2) __half {
  std::uint16_t bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

inline __half __float2half_rn(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t result;
  if (magnitude > 0x7f800000u) {
    return {0x7fff};                      // the device's one NaN
  } else if (magnitude >= 0x477ff000u) {  // 65520, halfway between the largest half and the next: to infinity
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // 2^-14: a subnormal half is a multiple of 2^-24, which the sum rounds to
    result = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - std::bit_cast<std::uint32_t>(0.5f);
  } else {  // rebiased; ties to even as for bfloat16
    result = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | result)};
}

inline float __half2float(__half value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = value.bits >> 10 & 31u;
  const std::uint32_t fraction = value.bits & 0x3ffu;
  if (exponent == 0) {
    const float subnormal = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -subnormal : subnormal;
  }
  return std::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
