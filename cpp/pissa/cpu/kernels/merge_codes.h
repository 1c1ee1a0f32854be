// A change rounded into codes (core/merge_codes.h). Included only by kernels.cc.
#pragma once

#include "pissa/core/merge_codes.h"
#include "pissa/cpu/kernels/formats.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

/// Elements at a time: the largest block of GGUF.
constexpr int kMergeRun = 256;

// Codes of part of a row, a byte each, and for each how many levels a change of 1 is.
struct RowCodes {
  alignas(64) std::uint8_t code[kMergeRun];
  alignas(64) float levels[kMergeRun];
};

// Elements whose scale is zero, so small that this overflows, or no number, cannot change.
PISSA_INLINE float levels_of_one(float scale) {
  const float levels = 1.0f / scale, size = levels < 0.0f ? -levels : levels;
  return size < float_of(0x7f800000u) ? levels : 0.0f;
}

template <class Codes>
PISSA_INLINE void read_codes(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count,
                             RowCodes& to) {
  constexpr Format kFormat = Codes::kFormat;
  if constexpr (is_read_only(kFormat)) {
    for (std::int64_t i = 0; i < count; i += Codes::kElements) {
      const std::uint8_t* block = Codes::block_at(weight, row, col + i);
      typename Codes::Groups groups;
      groups.read(block);
      float levels[Codes::kGroups];
      for (int group = 0; group < Codes::kGroups; ++group) levels[group] = levels_of_one(groups.scales[group]);
#pragma GCC unroll 16
      for (int run = 0; run < Codes::kElements / Codes::kRun; ++run) {
        for (int j = 0; j < Codes::kRun; ++j) {
          const int element = run * Codes::kRun + j;
          to.code[i + element] = static_cast<std::uint8_t>(gguf_bits<kFormat>(block, element));
          to.levels[i + element] = levels[element / Codes::kGroup];
        }
      }
    }
  } else {
    const auto* codes = static_cast<const std::uint8_t*>(weight.data);
    const std::int64_t first = row * weight.cols + col, blocksize = weight.scales.blocksize;
    std::int64_t done = 0;
    if constexpr (info(kFormat).bits == 4) {  // GCC vectorises it
      const std::int64_t pairs = first % 2 == 0 ? count / 2 : 0;
      for (std::int64_t i = 0; i < pairs; ++i) {
        const std::uint8_t byte = codes[first / 2 + i];
        to.code[2 * i] = kFormat == Format::nf4 ? byte >> 4 : byte & 15;
        to.code[2 * i + 1] = kFormat == Format::nf4 ? byte & 15 : byte >> 4;
      }
      done = 2 * pairs;
    }
    for (; done < count; ++done) to.code[done] = code_at<kFormat>(codes, first + done);
    for (std::int64_t i = 0; i < count;) {
      const float scale = block_absmax(weight.scales, Codes::block(weight.scales, row, col + i, weight.cols));
      const float levels = levels_of_one(kFormat == Format::int8 ? scale * kInt8Step : scale);
      const std::int64_t in_block = (kFormat == Format::fp8 ? col + i : first + i) % blocksize;
      const std::int64_t end = smaller(count, i + blocksize - in_block);
      for (; i < end; ++i) to.levels[i] = levels;
    }
  }
}

template <class Codes>
PISSA_INLINE void put_code_of(const Matrix& weight, std::int64_t row, std::int64_t col, std::uint8_t code,
                              std::uint8_t* codes) {
  if constexpr (is_read_only(Codes::kFormat)) {
    const std::int64_t block = row * (weight.cols / Codes::kElements) + col / Codes::kElements;
    put_gguf_bits<Codes::kFormat>(codes + block * Codes::kBytes, static_cast<int>(col % Codes::kElements), code);
  } else {
    put_code<Codes::kFormat>(codes, row * weight.cols + col, code);
  }
}

// Thresholds of elements [first, first + count) of the flattened weight, whose positions have the same high word.
PISSA_INLINE void read_thresholds(Rounding rounding, std::uint64_t seed, std::uint64_t first, std::int64_t count,
                                  float* to) {
  const std::uint32_t key = threshold_key(seed, first), low = static_cast<std::uint32_t>(first);
  if (rounding == Rounding::dither) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = threshold_at(key, low + static_cast<std::uint32_t>(i));
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = 0.5f;
  }
}

// Most elements stay. Which of them move is found for a run at once; these then move one by one.
void merge_codes(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count, const float* change,
                 Rounding rounding, std::uint64_t seed, std::uint8_t* codes, MergeSums& sums) {
  with_codes(weight.format, [&](auto kind) {
    using Codes = decltype(kind);
    constexpr auto& next = kNextCodes<Codes::kFormat>;
    constexpr int kCodes = NextCodes<Codes::kFormat>::kCodes;
    for (std::int64_t done = 0; done < count; done += kMergeRun) {
      const std::int64_t run = smaller(kMergeRun, count - done);
      const std::int64_t first = row * weight.cols + col + done;
      RowCodes from;
      read_codes<Codes>(weight, row, col + done, run, from);
      alignas(64) float threshold[kMergeRun], by[kMergeRun], chance[kMergeRun];
      alignas(64) std::uint8_t moves[kMergeRun] = {};
      const std::int64_t same = smaller(run, (std::int64_t{1} << 32) - (first & 0xffffffff));
      read_thresholds(rounding, seed, first, same, threshold);
      read_thresholds(rounding, seed, first + same, run - same, threshold + same);
      for (std::int64_t i = 0; i < run; ++i) by[i] = change[done + i] * from.levels[i];
      for (std::int64_t i = 0; i < run; ++i) {
        const float size = by[i] < 0.0f ? -by[i] : by[i];
        chance[i] = size * next.reciprocal[from.code[i] + (by[i] < 0.0f ? kCodes : 0)];
      }
      std::int32_t beyond = 0;
      for (std::int64_t i = 0; i < run; ++i) beyond += chance[i] < 0.0f;
      for (std::int64_t i = 0; i < run; ++i) {
        moves[i] = (by[i] < 0.0f ? 1.0f - threshold[i] : threshold[i]) < chance[i];
      }
      for (std::int64_t word = 0; word < run; word += 8) {
        std::uint64_t some;
        __builtin_memcpy(&some, moves + word, sizeof some);
        for (; some != 0; some &= some - 1) {  // a byte of them is 1 or 0
          const std::int64_t i = word + __builtin_ctzll(some) / 8;
          const ChangedCode changed = changed_code<Codes::kFormat>(from.code[i], by[i], threshold[i]);
          const double moved = double{changed.by} / from.levels[i];
          beyond += changed.beyond;
          sums.along += moved * change[done + i];
          sums.square += moved * moved;
          sums.moved += 1;
          put_code_of<Codes>(weight, row, col + done + i, changed.code, codes);
        }
      }
      sums.beyond += beyond;
    }
  });
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
