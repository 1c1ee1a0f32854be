// Test matrices: float64 values, and their storage in memory the way callers have it, with traps around it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <random>
#include <stdexcept>
#include <utility>
#include <variant>
#include <vector>

#include "pissa/core/int8.h"
#include "pissa/core/nested_scales.h"
#include "pissa/core/nf4.h"
#include "pissa/core/types.h"
#include "support/formats.h"

namespace pissa::test {

/// A float64 matrix, in which the tests do their own arithmetic.
struct Dense {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<double> values;

  Dense() = default;
  Dense(std::int64_t rows_, std::int64_t cols_, double value = 0)
      : rows(rows_), cols(cols_), values(rows_ * cols_, value) {}
  double& operator()(std::int64_t i, std::int64_t j) { return values[i * cols + j]; }
  double operator()(std::int64_t i, std::int64_t j) const { return values[i * cols + j]; }
};

/// Seeded random numbers, the same with every standard library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {                                                            // Box, Muller
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  }
  std::int64_t below(std::int64_t limit) {
    return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(limit));
  }
  bool coin() { return below(2) == 1; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<std::int64_t>(choices.size()))];
  }
  Dense dense(std::int64_t rows, std::int64_t cols) {
    Dense result(rows, cols);
    for (double& value : result.values) value = normal();
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

/// A dense matrix in memory: the first element is not at an aligned address, unless asked for, rows are padded, and
/// everything that is not an element is 0xff, NaN in every format: read it and the result is NaN, write it and
/// `padding_intact` tells.
class Stored {
 public:
  static constexpr std::int64_t kAligned = 8;  // as lead and, for every row, padding of a multiple: by 16 bytes

  Stored(const Dense& values, Format format, std::int64_t padding = 3, std::int64_t lead = 1)
      : Stored(poisoned(values.rows, values.cols, format, padding, lead)) {
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = 0; j < cols_; ++j) write_element(format_, at(i, j), values(i, j));
    }
  }
  /// Every element is NaN.
  static Stored poisoned(std::int64_t rows, std::int64_t cols, Format format, std::int64_t padding = 3,
                         std::int64_t lead = 1) {
    return {rows, cols, format, padding, lead};
  }

  Matrix view() const { return {at(0, 0), rows_, cols_, ld_, format_}; }
  MutableMatrix mutable_view() { return {at(0, 0), rows_, cols_, ld_, format_}; }
  Format format() const { return format_; }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }

  Dense values() const {
    Dense result(rows_, cols_);
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = 0; j < cols_; ++j) result(i, j) = read_element(format_, at(i, j));
    }
    return result;
  }
  bool padding_intact() const {
    const auto intact = [](auto from, auto to) {
      return std::all_of(from, to, [](auto byte) { return byte == 0xff; });
    };
    auto rest = bytes_.begin();
    for (std::int64_t i = 0; i < rows_; ++i) {
      const auto row = bytes_.begin() + (at(i, 0) - bytes_.data());
      if (!intact(rest, row)) return false;
      rest = row + cols_ * element_size(format_);
    }
    return intact(rest, bytes_.end());
  }

 private:
  Stored(std::int64_t rows, std::int64_t cols, Format format, std::int64_t padding, std::int64_t lead)
      : rows_(rows),
        cols_(cols),
        ld_(cols + padding),
        lead_(lead),
        format_(format),
        // After the last row nothing, so that AddressSanitizer sees a read beyond it.
        bytes_((lead + (rows > 0 ? (rows - 1) * ld_ + cols : 0)) * element_size(format), 0xff) {}

  const std::uint8_t* at(std::int64_t i, std::int64_t j) const {
    return bytes_.data() + (lead_ + i * ld_ + j) * element_size(format_);
  }
  std::uint8_t* at(std::int64_t i, std::int64_t j) {
    return bytes_.data() + (lead_ + i * ld_ + j) * element_size(format_);
  }

  std::int64_t rows_, cols_, ld_, lead_;
  Format format_;
  std::vector<std::uint8_t> bytes_;
};

/// The level of element i of a flattened matrix whose codes are levels.
inline float level_at(Format format, const void* data, std::int64_t i) {
  const auto* codes = static_cast<const std::uint8_t*>(data);
  const int low = codes[i / 2] & 15, high = codes[i / 2] >> 4;
  if (format == Format::nf4) return kNf4Levels[i % 2 == 0 ? high : low];
  const int code = i % 2 == 0 ? low : high;
  return format == Format::int4 ? static_cast<float>(code - 8) : static_cast<float>(kE2m1.decode(code));
}

/// Random scales, as a format stores them, or in f32.
class StoredScales {
 public:
  StoredScales(Random& random, ScaleKind kind, std::int64_t blocks) : kind_(kind) {
    for (std::int64_t i = 0; i < blocks; ++i) {
      absmax_.push_back(static_cast<float>(0.5 + random.uniform()));
      absmax16_.push_back(static_cast<std::uint16_t>(kBf16.encode(absmax_.back())));
      // Powers of two around 1, and bytes of a table or of the dynamic map.
      absmax8_.push_back(
          static_cast<std::uint8_t>(kind == ScaleKind::e8m0 ? 125 + random.below(4) : random.below(256)));
    }
    for (std::int64_t i = 0; i < ceil_div(blocks, 256); ++i)
      nested_absmax_.push_back(static_cast<float>(0.5 + random.uniform()));
    for (int i = 0; i < 256; ++i) levels_.push_back(static_cast<float>(0.5 + random.uniform()));
  }

  void set(Scales& scales) const {
    if (kind_ == ScaleKind::f32) scales.absmax = absmax_.data();
    else if (kind_ == ScaleKind::bf16) scales.absmax16 = absmax16_.data();
    else scales.absmax8 = absmax8_.data();
    if (kind_ == ScaleKind::e4m3) scales.levels = levels_.data();
    if (kind_ == ScaleKind::nested) {
      scales.nested_absmax = nested_absmax_.data();
      scales.offset = &offset_;
    }
  }
  float value(std::int64_t block) const {
    switch (kind_) {
      case ScaleKind::bf16:
        return static_cast<float>(kBf16.decode(absmax16_[block]));
      case ScaleKind::e8m0:
        return std::ldexp(1.0f, absmax8_[block] - 127);
      case ScaleKind::e4m3:
        return levels_[absmax8_[block]];
      case ScaleKind::nested: {
        const float product = kDynamicMap[absmax8_[block]] * nested_absmax_[block / 256];
        return product + offset_;
      }
      default:
        return absmax_[block];
    }
  }

 private:
  ScaleKind kind_;
  std::vector<float> absmax_;
  std::vector<std::uint16_t> absmax16_;
  std::vector<std::uint8_t> absmax8_;
  std::vector<float> nested_absmax_;
  std::vector<float> levels_;
  float offset_ = 1.25f;
};

/// A matrix of levels, as NF4, with random codes and scales.
class StoredLevels {
 public:
  StoredLevels(Random& random, Format format, std::int64_t rows, std::int64_t cols, int blocksize, bool nested)
      : format_(format),
        rows_(rows),
        cols_(cols),
        blocksize_(blocksize),
        scales_(random, kind(random, format, nested), ceil_div(rows * cols, blocksize)),
        codes_(code_bytes(format, rows * cols)) {
    for (std::uint8_t& code : codes_) code = static_cast<std::uint8_t>(random.below(256));
  }

  Matrix view() const {
    Matrix matrix{codes_.data(), rows_, cols_, 0, format_};  // ld is ignored
    matrix.scales.blocksize = blocksize_;
    scales_.set(matrix.scales);
    return matrix;
  }
  Dense values() const {
    Dense result(rows_, cols_);
    for (std::int64_t i = 0; i < rows_ * cols_; ++i) {
      const float scale = scales_.value(i / blocksize_);
      result.values[i] = level_at(format_, codes_.data(), i) * scale;  // one rounding to f32: the format's definition
    }
    return result;
  }

 private:
  // Nested scales, or bf16 ones, may be f32 too.
  static ScaleKind kind(Random& random, Format format, bool nested) {
    const ScaleKind kind = info(format).scales;
    if (kind == ScaleKind::nested ? !nested : kind == ScaleKind::bf16 && random.coin()) return ScaleKind::f32;
    return kind;
  }

  Format format_;
  std::int64_t rows_, cols_, blocksize_;
  StoredScales scales_;
  std::vector<std::uint8_t> codes_;
};

/// The scale of element i of a flattened matrix with scales beside its codes.
inline float scale_of(const Matrix& matrix, std::int64_t i) {
  const Scales& scales = matrix.scales;
  const std::int64_t block = matrix.format == Format::fp8
                                 ? i / matrix.cols / scales.rows * scales.across + i % matrix.cols / scales.blocksize
                                 : i / scales.blocksize;
  if (scales.absmax) return scales.absmax[block];
  if (scales.absmax16) return static_cast<float>(kBf16.decode(scales.absmax16[block]));
  if (scales.levels) return scales.levels[scales.absmax8[block]];
  if (!scales.nested_absmax) return std::ldexp(1.0f, scales.absmax8[block] - 127);
  const float product = kDynamicMap[scales.absmax8[block]] * scales.nested_absmax[block / 256];
  return product + *scales.offset;
}

/// An FP8 matrix with random codes and scales of tiles [height, width].
class StoredFp8 {
 public:
  StoredFp8(Random& random, std::int64_t rows, std::int64_t cols, std::int64_t height, std::int64_t width,
            ScaleKind kind)
      : rows_(rows),
        cols_(cols),
        height_(height),
        width_(width),
        scales_(random, kind, ceil_div(rows, height) * ceil_div(cols, width)),
        codes_(rows * cols) {
    for (std::uint8_t& code : codes_)
      code = static_cast<std::uint8_t>(random.below(64) + 128 * random.coin());  // below 2
  }

  Matrix view() const {
    Matrix matrix{codes_.data(), rows_, cols_, 0, Format::fp8};  // ld is ignored
    matrix.scales.blocksize = width_;
    matrix.scales.rows = height_;
    matrix.scales.across = ceil_div(cols_, width_);
    scales_.set(matrix.scales);
    return matrix;
  }
  Dense values() const {
    Dense result(rows_, cols_);
    for (std::int64_t i = 0; i < rows_; ++i) {
      for (std::int64_t j = 0; j < cols_; ++j) {
        const float scale = scales_.value(i / height_ * ceil_div(cols_, width_) + j / width_);
        result(i, j) = static_cast<float>(kE4m3.decode(codes_[i * cols_ + j])) * scale;
      }
    }
    return result;
  }

 private:
  std::int64_t rows_, cols_, height_, width_;
  StoredScales scales_;
  std::vector<std::uint8_t> codes_;
};

struct StoredNf4 : StoredLevels {
  StoredNf4(Random& random, std::int64_t rows, std::int64_t cols, int blocksize, bool nested)
      : StoredLevels(random, Format::nf4, rows, cols, blocksize, nested) {}
};

/// An INT8 matrix with random codes and scales.
class StoredInt8 {
 public:
  StoredInt8(Random& random, std::int64_t rows, std::int64_t cols) : rows_(rows), cols_(cols), codes_(rows * cols) {
    for (std::int8_t& code : codes_) code = static_cast<std::int8_t>(random.below(255) - 127);
    for (std::int64_t i = 0; i < rows; ++i) scales_.push_back(static_cast<float>(0.5 + random.uniform()));
  }

  Matrix view() const {
    Matrix matrix{codes_.data(), rows_, cols_, 0, Format::int8};  // ld is ignored
    matrix.scales.blocksize = cols_;
    matrix.scales.absmax = scales_.data();
    return matrix;
  }
  Dense values() const {
    Dense result(rows_, cols_);
    for (std::int64_t i = 0; i < rows_ * cols_; ++i) {
      const float product = codes_[i] * scales_[i / cols_];
      result.values[i] = product * kInt8Step;  // two roundings to f32: the format's definition
    }
    return result;
  }

 private:
  std::int64_t rows_, cols_;
  std::vector<std::int8_t> codes_;
  std::vector<float> scales_;
};

/// The element of a block of GGUF, as llama.cpp's dequantize_row functions have it, byte by byte, and exact.
inline double gguf_element(Format format, const std::uint8_t* block, int i) {
  const auto half = [&](int at) { return kF16.decode(block[at] | block[at + 1] << 8); };
  const auto nibble = [&](int codes) { return i < 16 ? block[codes + i] & 15 : block[codes + i - 16] >> 4; };
  const auto fifth = [&](int bits) { return (block[bits + i / 8] >> (i % 8) & 1) << 4; };
  constexpr int kIq4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  const int half_block = i / 128, quarter = i % 128 / 32, l = i % 32;
  switch (format) {
    case Format::q4_0:
      return half(0) * (nibble(2) - 8);
    case Format::q4_1:
      return half(0) * nibble(4) + half(2);
    case Format::q5_0:
      return half(0) * ((nibble(6) | fifth(2)) - 16);
    case Format::q5_1:
      return half(0) * (nibble(8) | fifth(4)) + half(2);
    case Format::q8_0:
      return half(0) * static_cast<std::int8_t>(block[2 + i]);
    case Format::iq4_nl:
      return half(0) * kIq4[nibble(2)];
    case Format::mxfp4_gguf:
      return std::ldexp(kE2m1.decode(nibble(1)), block[0] - 127);
    case Format::q2_k: {
      const int scale = block[i / 16], code = block[16 + 32 * half_block + l] >> (2 * quarter) & 3;
      return half(80) * (scale & 15) * code - half(82) * (scale >> 4);
    }
    case Format::q3_k: {
      const int group = i / 16;
      const int low = group < 8 ? block[96 + group] & 15 : block[96 + group - 8] >> 4;
      const int scale = low | (block[104 + group % 4] >> (2 * (group / 4)) & 3) << 4;
      const int code = block[32 + 32 * half_block + l] >> (2 * quarter) & 3;
      const bool has_bit = (block[l] >> (4 * half_block + quarter) & 1) != 0;
      return half(108) * (scale - 32) * (code - (has_bit ? 0 : 4));
    }
    case Format::q4_k:
    case Format::q5_k: {
      const std::uint8_t* q = block + 4;  // get_scale_min_k4
      const int j = i / 32;
      const int scale = j < 4 ? q[j] & 63 : (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
      const int minimum = j < 4 ? q[j + 4] & 63 : q[j + 4] >> 4 | (q[j] >> 6) << 4;
      const int byte = block[(format == Format::q4_k ? 16 : 48) + 32 * (j / 2) + l];
      int code = j % 2 == 0 ? byte & 15 : byte >> 4;
      if (format == Format::q5_k) code += block[16 + l] >> j & 1 ? 16 : 0;
      return half(0) * scale * code - half(2) * minimum;
    }
    case Format::q6_k: {
      const int byte = block[64 * half_block + 32 * (quarter % 2) + l];
      const int high = block[128 + 32 * half_block + l] >> (2 * quarter) & 3;
      const int code = (quarter < 2 ? byte & 15 : byte >> 4) | high << 4;
      return half(208) * static_cast<std::int8_t>(block[192 + i / 16]) * (code - 32);
    }
    case Format::iq4_xs: {
      const int group = i / 32, byte = block[8 + 16 * group + i % 16];
      const int low = block[4 + group / 2] >> (4 * (group % 2)) & 15;
      const int high = (block[2] | block[3] << 8) >> (2 * group) & 3;
      return half(0) * ((low | high << 4) - 32) * kIq4[l < 16 ? byte & 15 : byte >> 4];
    }
    default:
      throw std::logic_error("no blocks of GGUF");
  }
}

/// A matrix of random blocks of GGUF with scales of ordinary size.
class StoredGguf {
 public:
  StoredGguf(Random& random, Format format, std::int64_t rows, std::int64_t cols)
      : format_(format), rows_(rows), cols_(cols), bytes_(code_bytes(format, rows * cols)) {
    for (std::uint8_t& byte : bytes_) byte = static_cast<std::uint8_t>(random.below(256));
    for (std::size_t block = 0; block < bytes_.size(); block += info(format).block_bytes) {
      if (format == Format::mxfp4_gguf) bytes_[block] = static_cast<std::uint8_t>(124 + random.below(4));
      for (const int at : halves(format)) {
        const auto bits = kF16.encode((random.coin() ? 1 : -1) * (0.5 + random.uniform()) / 32);
        std::memcpy(&bytes_[block + at], &bits, 2);
      }
    }
  }

  Matrix view() const {
    Matrix matrix{bytes_.data(), rows_, cols_, 0, format_};  // ld is ignored
    matrix.scales.blocksize = info(format_).blocks.usual;
    return matrix;
  }
  Dense values() const {
    Dense result(rows_, cols_);
    const std::int64_t elements = info(format_).blocks.usual;
    for (std::int64_t i = 0; i < rows_ * cols_; ++i) {
      const std::uint8_t* block = bytes_.data() + i / elements * info(format_).block_bytes;
      result.values[i] = static_cast<float>(gguf_element(format_, block, static_cast<int>(i % elements)));
    }
    return result;
  }

 private:
  /// Where blocks have numbers of 16 bits.
  static std::vector<int> halves(Format format) {
    switch (format) {
      case Format::mxfp4_gguf:
        return {};
      case Format::q4_1:
      case Format::q5_1:
      case Format::q4_k:
      case Format::q5_k:
        return {0, 2};
      case Format::q2_k:
        return {80, 82};
      case Format::q3_k:
        return {108};
      case Format::q6_k:
        return {208};
      default:
        return {0};
    }
  }

  Format format_;
  std::int64_t rows_, cols_;
  std::vector<std::uint8_t> bytes_;
};

/// The forms in which a GEMM reads an operand, and a random normal matrix in one of them. A Format is a form, too:
/// those of GGUF's blocks have no other name.
enum class Form { f32, bf16, f16, nf4, int8, mxfp4, nvfp4, int4, fp8, nf4_nested = 1000 };
/// Those of matrices of any size.
inline constexpr std::initializer_list<Form> kForms = {Form::f32,  Form::bf16,      Form::f16,   Form::nf4,
                                                       Form::int8, Form::mxfp4,     Form::nvfp4, Form::int4,
                                                       Form::fp8,  Form::nf4_nested};
/// Those whose rows are whole blocks.
inline const std::vector<Form>& gguf_forms() {
  static const std::vector<Form> forms = [] {
    std::vector<Form> found;
    for (const Format format : kFormats) {
      if (is_read_only(format)) found.push_back(static_cast<Form>(format));
    }
    return found;
  }();
  return forms;
}
inline constexpr std::initializer_list<Format> kFloatFormats = {Format::f32, Format::bf16, Format::f16};

inline const char* name(Format format) { return info(format).name; }
inline const char* name(Form form) { return form == Form::nf4_nested ? "nf4_nested" : name(static_cast<Format>(form)); }

class Operand {
 public:
  Operand(Random& random, std::int64_t rows, std::int64_t cols, Form form) : stored_(make(random, rows, cols, form)) {}
  Operand(Stored stored) : stored_(std::move(stored)) {}

  Matrix view() const {
    return std::visit([](const auto& stored) { return stored.view(); }, stored_);
  }
  Dense values() const {
    return std::visit([](const auto& stored) { return stored.values(); }, stored_);
  }

 private:
  using Any = std::variant<Stored, StoredLevels, StoredInt8, StoredFp8, StoredGguf>;

  static Any make(Random& random, std::int64_t rows, std::int64_t cols, Form form) {
    if (form == Form::int8) return StoredInt8(random, rows, cols);
    if (form == Form::nf4_nested)
      return StoredLevels(random, Format::nf4, rows, cols, random.pick({32, 64, 4096}), true);
    if (form == Form::fp8) {
      const ScaleKind kind = random.pick({ScaleKind::f32, ScaleKind::bf16, ScaleKind::e8m0});
      const std::int64_t width = random.pick({std::int64_t{32}, std::int64_t{128}, std::max<std::int64_t>(cols, 1)});
      return StoredFp8(random, rows, cols, width == 128 ? 128 : 1, width, kind);
    }
    if (is_read_only(static_cast<Format>(form))) return StoredGguf(random, static_cast<Format>(form), rows, cols);
    if (is_quantized(static_cast<Format>(form))) {
      const BlockRule rule = info(static_cast<Format>(form)).blocks;
      const int blocksize = rule.in_row ? random.pick({static_cast<int>(rule.least), static_cast<int>(rule.most)})
                                        : random.pick({32, 64, 4096});
      return StoredLevels(random, static_cast<Format>(form), rows, cols, blocksize, false);
    }
    return Stored(random.dense(rows, cols), static_cast<Format>(form), random.below(5));
  }

  Any stored_;
};

}  // namespace pissa::test
