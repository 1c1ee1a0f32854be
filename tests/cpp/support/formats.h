// The floating-point formats, from their definitions: sign, exponent, fraction and ldexp, in float64.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "pissa/core/types.h"

namespace pissa::test {

/// A binary format: `precision` significant bits with the hidden one, `exponent_bits` bits of exponent.
struct FloatFormat {
  int precision;
  int exponent_bits;
  bool has_infinities = true;  // or, to `decode`, the highest exponent is one of numbers

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  /// Half an ulp relative to the number: the largest relative error of rounding to nearest.
  double unit_roundoff() const { return std::ldexp(1.0, -precision); }
  /// Half the distance between subnormals: the largest absolute error of rounding among them.
  double half_subnormal() const { return std::ldexp(1.0, 1 - bias() - precision); }

  double decode(std::uint32_t bits) const {
    const int fraction_bits = precision - 1;
    const std::uint32_t fraction = bits & ((1u << fraction_bits) - 1);
    const int exponent = static_cast<int>(bits >> fraction_bits) & ((1 << exponent_bits) - 1);
    const double sign = bits >> (fraction_bits + exponent_bits) ? -1.0 : 1.0;
    if (has_infinities && exponent == (1 << exponent_bits) - 1) {
      return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
    }
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias() - fraction_bits);
    return sign * std::ldexp(fraction + std::ldexp(1.0, fraction_bits), exponent - bias() - fraction_bits);
  }

  /// To nearest, ties to even; overflow gives infinity; NaN gives the quiet NaN.
  std::uint32_t encode(double value) const {
    const int fraction_bits = precision - 1;
    const std::uint32_t sign = std::signbit(value) ? 1u << (fraction_bits + exponent_bits) : 0u;
    const std::uint32_t infinity = ((1u << exponent_bits) - 1) << fraction_bits;
    if (std::isnan(value)) return sign | infinity | (1u << (fraction_bits - 1));
    if (value == 0) return sign;
    if (std::isinf(value)) return sign | infinity;
    const int exponent = std::max(std::ilogb(value), 1 - bias());
    const double units = std::nearbyint(std::ldexp(std::fabs(value), fraction_bits - exponent));  // of the last place
    // As an integer, the encoding counts representable numbers upwards from 0, so a carry into the exponent is right.
    const double steps = units + std::ldexp(exponent + bias() - 1.0, fraction_bits);
    return sign | static_cast<std::uint32_t>(std::min(steps, static_cast<double>(infinity)));
  }
};

inline constexpr FloatFormat kBf16{8, 8};
inline constexpr FloatFormat kF16{11, 5};
inline constexpr FloatFormat kF32{24, 8};
inline constexpr FloatFormat kE4m3{4, 4, false};
inline constexpr FloatFormat kE2m1{2, 2, false};

inline FloatFormat float_format(Format format) {
  return format == Format::bf16 ? kBf16 : format == Format::f16 ? kF16 : kF32;
}

inline void write_element(Format format, std::uint8_t* to, double value) {
  const std::uint32_t bits = format == Format::f32 ? std::bit_cast<std::uint32_t>(static_cast<float>(value))
                                                   : float_format(format).encode(value);
  std::memcpy(to, &bits, element_size(format));  // little endian
}

inline double read_element(Format format, const std::uint8_t* from) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, from, element_size(format));
  return format == Format::f32 ? std::bit_cast<float>(bits) : float_format(format).decode(bits);
}

}  // namespace pissa::test
