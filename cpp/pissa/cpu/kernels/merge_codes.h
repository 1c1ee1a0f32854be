// A change rounded into codes (core/merge_codes.h). Included only by kernels.cc.
#pragma once

#include "pissa/core/merge_codes.h"
#include "pissa/cpu/kernels/formats.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

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
#pragma GCC unroll 16
      for (int run = 0; run < Codes::kElements / Codes::kRun; ++run) {
        std::uint8_t* code = to.code + i + run * Codes::kRun;
        for (int j = 0; j < Codes::kRun; ++j) {
          code[j] = static_cast<std::uint8_t>(gguf_bits<kFormat>(block, run * Codes::kRun + j));
        }
      }
      for (int group = 0; group < Codes::kGroups; ++group) {
        const float levels = levels_of_one(groups.scales[group]);
        float* of_group = to.levels + i + group * Codes::kGroup;
        for (int j = 0; j < Codes::kGroup; ++j) of_group[j] = levels;
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

// Which of the elements [0, count) move, 1 or 0; the positions of all in the flattened weight have the same high word.
// Returns the number of those whose change leads beyond the last level at once.
template <Format format, Rounding rounding>
PISSA_INLINE std::int32_t find_moves(const RowCodes& from, const float* change, std::uint32_t key, std::uint32_t low,
                                     std::int64_t first, std::int64_t count, std::uint8_t* moves) {
  constexpr auto& next = kNextCodes<format>;
  constexpr EndCodes kEnds = kEndCodes<format>;
  std::int32_t beyond = 0;
  for (std::int64_t i = first; i < first + count; ++i) {
    const float by = change[i] * from.levels[i], size = by < 0.0f ? -by : by;
    const bool down = by < 0.0f;
    float chance;
    if constexpr (kEnds.uniform) {
      const int number = number_of_code<format>(from.code[i]);
      const int room = down ? number - kEnds.first : kEnds.last - number;  // in this form GCC vectorises it
      chance = room <= 0 ? -size : size;
    } else {
      chance = size * next.reciprocal[from.code[i] + (down ? NextCodes<format>::kCodes : 0)];
    }
    const float threshold =
        rounding == Rounding::nearest ? 0.5f : threshold_at(key, low + static_cast<std::uint32_t>(i - first));
    moves[i] = (down ? 1.0f - threshold : threshold) < chance;
    beyond += chance < 0.0f;
  }
  return beyond;
}

// Most elements stay. Which of them move is found for a run at once; these then move one by one.
template <class Codes, Rounding rounding>
PISSA_INLINE void merge_row(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count,
                            const float* change, std::uint64_t seed, std::uint8_t* codes, MergeSums& sums) {
  constexpr Format kFormat = Codes::kFormat;
  for (std::int64_t done = 0; done < count; done += kMergeRun, change += kMergeRun) {
    const std::int64_t run = smaller(kMergeRun, count - done);
    const auto position = static_cast<std::uint64_t>(row * weight.cols + col + done);
    RowCodes from;
    alignas(64) std::uint8_t moves[kMergeRun] = {};
    read_codes<Codes>(weight, row, col + done, run, from);
    const std::int64_t same = smaller(run, (std::int64_t{1} << 32) - static_cast<std::int64_t>(position & 0xffffffff));
    for (std::int64_t first = 0; first < run;) {
      const std::uint64_t at = position + static_cast<std::uint64_t>(first);
      const std::int64_t some = first == 0 ? same : run - same;
      sums.beyond += find_moves<kFormat, rounding>(from, change, threshold_key(seed, at),
                                                   static_cast<std::uint32_t>(at), first, some, moves);
      first += some;
    }
    for (std::int64_t word = 0; word < run; word += 8) {
      std::uint64_t some;
      __builtin_memcpy(&some, moves + word, sizeof some);
      for (; some != 0; some &= some - 1) {  // a byte of them is 1 or 0
        const std::int64_t i = word + __builtin_ctzll(some) / 8;
        const std::uint64_t at = position + static_cast<std::uint64_t>(i);
        const float threshold = threshold_of(rounding, seed, at);
        const ChangedCode changed = changed_code<kFormat>(from.code[i], change[i] * from.levels[i], threshold);
        sums.beyond += changed.beyond;
        if (changed.code == from.code[i]) continue;
        const double moved = double{changed.by} / from.levels[i];
        sums.along += moved * change[i];
        sums.square += moved * moved;
        sums.moved += 1;
        put_code_of<Codes>(weight, row, col + done + i, changed.code, codes);
      }
    }
  }
}

void merge_codes(const Matrix& weight, std::int64_t row, std::int64_t col, std::int64_t count, const float* change,
                 Rounding rounding, std::uint64_t seed, std::uint8_t* codes, MergeSums& sums) {
  with_codes(weight.format, [&](auto kind) {
    using Codes = decltype(kind);
    if (rounding == Rounding::nearest) {
      merge_row<Codes, Rounding::nearest>(weight, row, col, count, change, seed, codes, sums);
    } else {
      merge_row<Codes, Rounding::dither>(weight, row, col, count, change, seed, codes, sums);
    }
  });
}

// From the last column to the first, as in core/error_feedback.h: an element's error goes into the sums of the columns
// before it.
void merge_columns(const Matrix& weight, const Matrix& lower, std::int64_t row, std::int64_t col, std::int64_t count,
                   float* change, float* sum, Rounding rounding, std::uint64_t seed, std::uint8_t* codes,
                   MergeSums& sums) {
  with_codes(weight.format, [&](auto kind) {
    using Codes = decltype(kind);
    constexpr Format kFormat = Codes::kFormat;
    RowCodes from;
    read_codes<Codes>(weight, row, col, count, from);
    for (std::int64_t j = count - 1; j >= 0; --j) {
      const float* behind = static_cast<const float*>(lower.data) + (col + j) * lower.ld + col;
      const auto at = static_cast<std::uint64_t>(row * weight.cols + col + j);
      const float threshold = threshold_of(rounding, seed, at);
      const float wanted = change[j] + sum[j] / behind[j];
      const ChangedCode changed = changed_code<kFormat>(from.code[j], wanted * from.levels[j], threshold);
      sums.beyond += changed.beyond;
      float error = change[j];
      if (changed.code != from.code[j]) {
        const double moved = double{changed.by} / from.levels[j];
        sums.along += moved * change[j];
        sums.square += moved * moved;
        sums.moved += 1;
        error -= static_cast<float>(moved);
        put_code_of<Codes>(weight, row, col + j, changed.code, codes);
      }
      for (std::int64_t k = 0; k < j; ++k) sum[k] += error * behind[k];
      change[j] = error;
    }
  });
}

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
