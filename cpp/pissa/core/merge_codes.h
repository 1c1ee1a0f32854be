// A change of a weight, rounded into its codes: new codes of the same format, with the same scales.
//
// Codes lie on their format's levels. If the sum of a level and a change that is small beside the distance of two
// levels were rounded to the nearest, the change would be lost. Dither (stochastic rounding) moves an element to the
// next level in the direction of its change with the probability |change| / distance, which is right on average. What
// is random is a threshold of each element, a function of a seed and the element's position. So threads, order and
// shards do not matter, the same change gives the same codes, and a level rises monotonically with the change.
#pragma once

#include <cstdint>

#include "pissa/core/format.h"
#include "pissa/core/four_bits.h"
#include "pissa/core/fp8.h"
#include "pissa/core/gguf.h"
#include "pissa/core/int8.h"

namespace pissa {

/// Elements of a row that are merged at a time: the largest block of GGUF.
inline constexpr std::int64_t kMergeRun = 256;

enum class Rounding : std::uint8_t { nearest, dither };

/// What became of a change, summed over elements.
struct MergeSums {
  double along = 0;         ///< the change times the change of the codes' elements
  double square = 0;        ///< the square of the change of the codes' elements
  std::int64_t moved = 0;   ///< elements that have another code
  std::int64_t beyond = 0;  ///< elements whose change leads beyond the first or the last level
};

// ---- Levels

/// The level of a code, which its block's scale multiplies; minima do not count. NaN for FP8's NaN.
template <Format format>
PISSA_INLINE constexpr float level_of_code(int code) {
  if constexpr (is_read_only(format)) return static_cast<float>(gguf_number<format>(code));
  else if constexpr (format == Format::int8) return static_cast<float>(static_cast<std::int8_t>(code));
  else if constexpr (format == Format::fp8) return e4m3_value(static_cast<std::uint8_t>(code));
  else return FourBits<format>::kLevels[code];
}

/// Whether a code may be written. No quantiser of signed bytes writes -128.
template <Format format>
constexpr bool is_target(int code) {
  const bool is_integer = info(format).bits == 8 && format != Format::fp8;
  return level_of_code<format>(code) == level_of_code<format>(code) && !(is_integer && code == 128);
}

/// For each code the next one above, at [code], and below, at [kCodes + code].
template <Format format>
struct NextCodes {
  static constexpr int kCodes = 1 << info(format).bits;
  std::uint8_t code[2 * kCodes];
  float distance[2 * kCodes];    ///< of the levels; infinite if there is none
  float reciprocal[2 * kCodes];  ///< -1 if there is none, but 0 for NaN, which stays
};

template <Format format>
inline constexpr NextCodes<format> kNextCodes = [] {
  constexpr float kInfinity = float_of(0x7f800000u), kNan = float_of(0x7fc00000u);
  constexpr int kCodes = NextCodes<format>::kCodes;
  float targets[kCodes]{};  // once, because clang evaluates at most 2^20 steps for a constant
  for (int code = 0; code < kCodes; ++code)
    targets[code] = is_target<format>(code) ? level_of_code<format>(code) : kNan;
  NextCodes<format> next{};
  for (int i = 0; i < 2 * kCodes; ++i) {
    const float level = level_of_code<format>(i % kCodes);
    next.code[i] = static_cast<std::uint8_t>(i % kCodes);
    next.distance[i] = kInfinity;
    for (int code = 0; code < kCodes; ++code) {
      if (!(i < kCodes ? targets[code] > level : targets[code] < level)) continue;  // NaN, whose sums are no constants
      const float distance = i < kCodes ? targets[code] - level : level - targets[code];
      if (!(distance < next.distance[i])) continue;
      next.code[i] = static_cast<std::uint8_t>(code);
      next.distance[i] = distance;
    }
    next.reciprocal[i] = level != level ? 0.0f : next.distance[i] < kInfinity ? 1.0f / next.distance[i] : -1.0f;
  }
  return next;
}();

/// A code as a number in the order of the levels, in a format whose levels are one apart: signed if it is a byte.
template <Format format>
PISSA_INLINE constexpr int number_of_code(std::uint8_t code) {
  return info(format).bits == 8 ? static_cast<std::int8_t>(code) : code;
}

/// Whether a format's levels are one apart; and, if so, the numbers of the first and the last code that may be written.
struct EndCodes {
  bool uniform;
  int first, last;
};

template <Format format>
inline constexpr EndCodes kEndCodes = [] {
  constexpr auto& next = kNextCodes<format>;
  constexpr int kCodes = NextCodes<format>::kCodes;
  EndCodes ends{format != Format::fp8, 0, 0};
  for (int i = 0; i < kCodes; ++i) {
    const auto code = static_cast<std::uint8_t>(i);
    if (!is_target<format>(i)) continue;
    if (next.code[i] == i) ends.last = number_of_code<format>(code);
    else ends.uniform = ends.uniform && next.distance[i] == 1.0f;
    if (next.code[kCodes + i] == i) ends.first = number_of_code<format>(code);
  }
  return ends;
}();

/// A code after a change.
struct ChangedCode {
  std::uint8_t code;
  float by;     ///< the change of its level
  bool beyond;  ///< whether the change leads beyond the last level
};

/// The code after a change of `by` levels, with its threshold, in (0, 1). NaN changes nothing.
template <Format format>
PISSA_INLINE constexpr ChangedCode changed_code(std::uint8_t code, float by, float threshold) {
  constexpr auto& next = kNextCodes<format>;
  const bool down = by < 0.0f;
  const int side = down ? NextCodes<format>::kCodes : 0;
  float rest = down ? -by : by, moved = 0.0f;
  for (; rest >= next.distance[side + code] && next.code[side + code] != code; code = next.code[side + code]) {
    rest -= next.distance[side + code];
    moved += next.distance[side + code];
  }
  const int at = side + code;
  const bool beyond = rest * next.reciprocal[at] < 0.0f;
  if ((down ? 1.0f - threshold : threshold) < rest * next.reciprocal[at]) {
    moved += next.distance[at];
    code = next.code[at];
  }
  return {code, down ? -moved : moved, beyond};
}

// ---- Thresholds

/// What a seed and the high word of an element's position make of the low word's thresholds.
PISSA_INLINE constexpr std::uint32_t mixed(std::uint32_t bits) {  // MurmurHash3's finaliser
  bits = (bits ^ bits >> 16) * 0x85ebca6bu;
  bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
  return bits ^ bits >> 16;
}

/// The key of the elements whose positions in the flattened weight have the same high word.
PISSA_INLINE constexpr std::uint32_t threshold_key(std::uint64_t seed, std::uint64_t position) {
  const std::uint32_t key = mixed(static_cast<std::uint32_t>(seed)) + static_cast<std::uint32_t>(seed >> 32);
  return mixed(key) + static_cast<std::uint32_t>(position >> 32);
}

/// The threshold of an element, in (0, 1), in steps of 2^-24.
PISSA_INLINE constexpr float threshold_at(std::uint32_t key, std::uint32_t low_position) {
  const std::uint32_t bits = mixed(mixed(key) ^ low_position);
  return (static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f;
}

/// The threshold of the element at that position in the flattened weight.
PISSA_INLINE constexpr float threshold_of(Rounding rounding, std::uint64_t seed, std::uint64_t position) {
  if (rounding == Rounding::nearest) return 0.5f;
  return threshold_at(threshold_key(seed, position), static_cast<std::uint32_t>(position));
}

// ---- Codes beside their scales

/// Code i of a format whose scales are not within; bitsandbytes has the first of two in the high nibble.
template <Format format>
PISSA_INLINE constexpr std::uint8_t code_at(const std::uint8_t* codes, std::int64_t i) {
  constexpr int kBits = info(format).bits;
  const std::int64_t bit = i * kBits ^ (format == Format::nf4 ? 4 : 0);
  return static_cast<std::uint8_t>(codes[bit / 8] >> bit % 8 & ((1 << kBits) - 1));
}

/// Replaces it.
template <Format format>
PISSA_INLINE constexpr void put_code(std::uint8_t* codes, std::int64_t i, unsigned code) {
  constexpr int kBits = info(format).bits, kMask = (1 << kBits) - 1;
  const std::int64_t bit = i * kBits ^ (format == Format::nf4 ? 4 : 0);
  replace_bits(codes[bit / 8], static_cast<int>(bit % 8), kMask, static_cast<int>(code));
}

}  // namespace pissa
