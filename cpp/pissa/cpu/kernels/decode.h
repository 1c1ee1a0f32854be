// Rows of a matrix as numbers for computing, and numbers rounded to what a matrix stores. Included only by kernels.cc.
#pragma once

#include "pissa/cpu/kernels/formats.h"

namespace pissa::cpu::PISSA_ISA {
namespace {

void decode(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count, float* out) {
  const std::int64_t offset = row * matrix.ld + col;
  switch (matrix.format) {
    case Format::f32:
      copy_elements(static_cast<const float*>(matrix.data) + offset, count, out);
      break;
    case Format::bf16:
      decode_bf16(static_cast<const std::uint16_t*>(matrix.data) + offset, count, out);
      break;
    case Format::f16:
      decode_f16(static_cast<const std::uint16_t*>(matrix.data) + offset, count, out);
      break;
    default:
      with_codes(matrix.format, [&](auto codes) { codes.template decode<F32>(matrix, row, col, count, out); });
  }
}

// 64 of 4,096 columns of NF4 take 4 ns each (Intel Xeon with AMX, AVX-512).
void decode_columns(const Matrix& matrix, std::int64_t row, const std::int64_t* columns, std::int64_t count,
                    float* out) {
  if (is_quantized(matrix.format)) {
    with_codes(matrix.format, [&](auto codes) {
      for (std::int64_t i = 0; i < count; ++i) {
        if constexpr (requires { codes.element(matrix, row, columns[i]); }) {
          out[i] = codes.element(matrix, row, columns[i]);
        } else {
          codes.template decode<F32>(matrix, row, columns[i], 1, out + i);
        }
      }
    });
  } else {
    for (std::int64_t i = 0; i < count; ++i) decode(matrix, row, columns[i], 1, out + i);
  }
}

void encode(const float* values, std::int64_t count, Format format, void* to) {
  switch (format) {
    case Format::f32:
      copy_elements(values, count, static_cast<float*>(to));
      break;
    case Format::bf16:
      encode_bf16(values, count, static_cast<std::uint16_t*>(to));
      break;
    case Format::f16:
      encode_f16(values, count, static_cast<std::uint16_t*>(to));
      break;
    default:
      break;  // written only by `quantize`
  }
}

void quantize(Format format, const float* values, std::int64_t count, std::int64_t blocksize, float global,
              std::uint8_t* codes, float* scales) {
  with_written_codes(format, [&](auto kind) { kind.quantize(values, count, blocksize, global, codes, scales); });
}

// The columns of a row depend on those after them, so one row is processed at a time. Its sums stay in L1.
void quantize_columns(const Matrix& w, const Matrix& lower, const float* reciprocals, Format format,
                      const Scales& scales, std::int64_t row, std::int64_t rows, std::int64_t first,
                      const MutableMatrix& errors, std::uint8_t* codes) {
  with_written_codes(format, [&](auto kind) {
    using Codes = decltype(kind);
    const std::int64_t count = errors.cols;
    const float* factor = static_cast<const float*>(lower.data) + first * lower.ld + first;
    for (std::int64_t i = row; i < row + rows; ++i) {
      float weights[kFeedbackColumns], scale[kFeedbackColumns];
      std::uint8_t row_codes[kFeedbackColumns];
      decode(w, i, first, count, weights);
      const std::int64_t start = i * w.cols + first;
      const std::int64_t first_block = Codes::block(scales, i, first, w.cols);
      float absmax[kFeedbackColumns];
      decode_absmax(scales, first_block, Codes::block(scales, i, first + count - 1, w.cols) - first_block + 1, absmax);
      for (std::int64_t j = 0; j < count; ++j) {
        scale[j] = absmax[Codes::block(scales, i, first + j, w.cols) - first_block];
      }
      float* sums = static_cast<float*>(errors.data) + i * errors.ld;
      for (std::int64_t j = count - 1; j >= 0; --j) {
        const float element = Codes::nearest(weights[j] + sums[j] * reciprocals[j], scale[j], row_codes[j]);
        const float error = weights[j] - element;
        const float* behind = factor + j * lower.ld;
        for (std::int64_t k = 0; k < j; ++k) sums[k] += error * behind[k];
        sums[j] = error;
      }
      Codes::pack(row_codes, count, codes + start * info(Codes::kFormat).bits / 8);
    }
  });
}

PISSA_INLINE void decode_elements(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                  float scale, F32, float* to) {
  decode(matrix, row, col, count, to);
  if (scale == 1.0f) return;
  for (std::int64_t i = 0; i < count; ++i) to[i] *= scale;
}

#if PISSA_HAS_BF16
// scale * from, rounded.
PISSA_INLINE void round_elements(const float* from, std::int64_t count, float scale, Half* to) {
  constexpr std::int64_t kStep = 2 * kWidth;
  const Vec::Reg factor = Vec::broadcast(scale);
  const auto store = [&](const float* values, Half* rounded) {
    Bf16::store(rounded, {Vec::mul(Vec::load(values), factor), Vec::mul(Vec::load(values + kWidth), factor)});
  };
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store(from + i, to + i);
  if (i == count) return;
  float rest[kStep] = {};
  Half rounded[kStep];
  for (std::int64_t k = i; k < count; ++k) rest[k - i] = from[k];
  store(rest, rounded);
  for (std::int64_t k = i; k < count; ++k) to[k] = rounded[k - i];
}

PISSA_INLINE void decode_elements(const Matrix& matrix, std::int64_t row, std::int64_t col, std::int64_t count,
                                  float scale, Bf16, Half* to) {
  if (scale == 1.0f && matrix.format == Format::bf16) {
    copy_elements(static_cast<const Half*>(matrix.data) + row * matrix.ld + col, count, to);
  } else if (scale == 1.0f && is_quantized(matrix.format)) {
    with_codes(matrix.format, [&](auto codes) { codes.template decode<Bf16>(matrix, row, col, count, to); });
  } else if (matrix.format == Format::f32) {
    round_elements(static_cast<const float*>(matrix.data) + row * matrix.ld + col, count, scale, to);
  } else {
    constexpr std::int64_t kRun = 256;
    alignas(64) float values[kRun];
    for (std::int64_t i = 0; i < count; i += kRun) {
      const std::int64_t run = smaller(kRun, count - i);
      decode(matrix, row, col + i, run, values);
      round_elements(values, run, scale, to + i);
    }
  }
}
#endif

}  // namespace
}  // namespace pissa::cpu::PISSA_ISA
