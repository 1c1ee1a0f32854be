// A matrix that a test quantises.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "pissa/core/quantized.h"

namespace pissa::test {

inline constexpr std::initializer_list<Format> kQuantizedFormats = {Format::nf4,   Format::int8, Format::mxfp4,
                                                                    Format::nvfp4, Format::int4, Format::fp8};

/// Room for its parts, and an element more, which nothing may write.
struct QuantizedResult {
  Format format;
  std::int64_t blocksize;
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  float global = 1.5f;

  /// The block size is that asked for, or the format's nearest to it.
  QuantizedResult(Format format, std::int64_t rows, std::int64_t cols, std::int64_t asked = 64)
      : format(format),
        blocksize(info(format).blocks.by_row()
                      ? cols
                      : std::clamp(asked, info(format).blocks.least, info(format).blocks.most)),
        codes(code_bytes(format, rows * cols) + 1, kCode),
        scales(ceil_div(rows * cols, blocksize) + 1, kScale) {}

  QuantOutput output() { return {format, blocksize, codes.data(), scales.data(), &global}; }

  bool padding_intact() const { return codes.back() == kCode && scales.back() == kScale; }
  bool untouched() const {
    return std::ranges::all_of(codes, [](std::uint8_t code) { return code == kCode; }) &&
           std::ranges::all_of(scales, [](float scale) { return scale == kScale; });
  }
  bool operator==(const QuantizedResult&) const = default;

 private:
  static constexpr std::uint8_t kCode = 0xee;
  static constexpr float kScale = -9.0f;
};

}  // namespace pissa::test
