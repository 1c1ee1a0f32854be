// The CPU backend's elementwise operations, in runs of a row: conversion, sums, scaling, the sketch, the largest.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

#include "pissa/core/philox.h"
#include "pissa/cpu/backend.h"
#include "pissa/cpu/kernels.h"
#include "pissa/cpu/parallel.h"
#include "pissa/cpu/runs.h"

namespace pissa::cpu {

void CpuBackend::copy(const Matrix& a, const MutableMatrix& out) const {
  for_each_run(executor_, out, [&](std::int64_t row, std::int64_t col, std::int64_t count) {
    float values[kRun];
    kernels_.decode(a, row, col, count, values);
    kernels_.encode(values, count, out.format, element(out, row, col));
  });
}

void CpuBackend::decode_rows(const Matrix& a, const std::int64_t* rows, const MutableMatrix& out) const {
  for_each_run(executor_, out, [&](std::int64_t row, std::int64_t col, std::int64_t count) {
    float values[kRun];
    kernels_.decode(a, rows[row] >= 0 && rows[row] < a.rows ? rows[row] : 0, col, count, values);
    kernels_.encode(values, count, out.format, element(out, row, col));
  });
}

void CpuBackend::add(const Matrix& a, const Matrix& b, const MutableMatrix& out) const {
  const bool dense = !is_quantized(a.format) && !is_quantized(b.format);
  if (dense && out.rows > 1 && a.ld == out.cols && b.ld == out.cols && out.ld == out.cols) {
    return add(as_row(a), as_row(b), as_row(out));
  }
  for_each_run(executor_, out, [&](std::int64_t row, std::int64_t col, std::int64_t count) {
    float values[kRun];
    float others[kRun];
    kernels_.decode(a, row, col, count, values);
    kernels_.decode(b, row, col, count, others);
    for (std::int64_t i = 0; i < count; ++i) values[i] += others[i];
    kernels_.encode(values, count, out.format, element(out, row, col));
  });
}

void CpuBackend::subtract(const Matrix& a, const Matrix& b, const MutableMatrix& out, double* squares) const {
  const std::int64_t runs = ceil_div(out.cols, kRun);
  std::vector<double> sums(static_cast<std::size_t>(out.rows * runs));  // one for each run, to fix their order
  for_each_run(executor_, out, [&](std::int64_t row, std::int64_t col, std::int64_t count) {
    float values[kRun];
    float others[kRun];
    kernels_.decode(a, row, col, count, values);
    kernels_.decode(b, row, col, count, others);
    for (std::int64_t i = 0; i < count; ++i) values[i] -= others[i];
    kernels_.encode(values, count, out.format, element(out, row, col));
    kernels_.decode(out, row, col, count, values);
    kernels_.gram(values, values, count, count, 0, 1, &sums[static_cast<std::size_t>(row * runs + col / kRun)], 1);
  });
  *squares = std::accumulate(sums.begin(), sums.end(), 0.0);
}

void CpuBackend::fill_signs(const MutableMatrix& out, std::uint64_t seed, float scale) const {
  parallel_for(executor_, out.rows, out.rows * out.cols, [&](std::int64_t row) {
    float* values = reinterpret_cast<float*>(element(out, row, 0));
    PhiloxBlock bits{};
    for (std::int64_t col = 0; col < out.cols; ++col) {
      const std::uint64_t index = static_cast<std::uint64_t>(row * out.cols + col);
      if (col == 0 || index % 128 == 0) bits = philox_signs(index / 128, seed);
      values[col] = (bits[index % 128 / 32] >> (index % 32)) & 1u ? -scale : scale;
    }
  });
}

void CpuBackend::scale_rows(const Matrix& a, const Matrix& s, float divisor, const MutableMatrix& out, Op op) const {
  parallel_for(executor_, a.rows, 4 * a.rows * a.cols, [&](std::int64_t row) {
    const float scale = std::sqrt(static_cast<const float*>(s.data)[row] / divisor);
    const float* from = static_cast<const float*>(a.data) + row * a.ld;
    float* to = static_cast<float*>(out.data) + (op == Op::n ? row * out.ld : row);
    const std::int64_t step = op == Op::n ? 1 : out.ld;
    for (std::int64_t col = 0; col < a.cols; ++col) to[col * step] = scale * from[col];
  });
}

namespace {

// NaN as soon as either is NaN.
float larger(float a, float b) { return std::isnan(a) || b <= a ? a : b; }

// For halves. Without their signs they are ordered like integers, with NaN above infinity; decoding takes a third
// longer.
std::int16_t largest_magnitude(const std::int16_t* halves, std::int64_t count) {
  std::int16_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) largest = std::max<std::int16_t>(largest, halves[i] & 0x7fff);
  return largest;
}

float max_abs_of_row(const Kernels& kernels, const Matrix& a, std::int64_t row) {
  if (a.format == Format::f32) return kernels.max_abs(static_cast<const float*>(a.data) + row * a.ld, a.cols);
  float values[kRun];
  if (!is_quantized(a.format)) {
    const std::int16_t half = largest_magnitude(static_cast<const std::int16_t*>(a.data) + row * a.ld, a.cols);
    kernels.decode({&half, 1, 1, 1, a.format}, 0, 0, 1, values);
    return values[0];
  }
  float largest = 0;
  for (std::int64_t col = 0; col < a.cols; col += kRun) {
    const std::int64_t count = std::min(kRun, a.cols - col);
    kernels.decode(a, row, col, count, values);
    largest = larger(largest, kernels.max_abs(values, count));
  }
  return largest;
}

}  // namespace

void CpuBackend::normalize_rows(const Matrix& a, const MutableMatrix& out) const {
  parallel_for(executor_, out.rows, 8 * out.rows * out.cols, [&](std::int64_t row) {
    const float largest = max_abs_of_row(kernels_, a, row);
    const int exponent = largest > 0 ? std::ilogb(largest) : 0;
    for (std::int64_t col = 0; col < out.cols; col += kRun) {
      const std::int64_t count = std::min(kRun, out.cols - col);
      float values[kRun];
      kernels_.decode(a, row, col, count, values);
      for (std::int64_t i = 0; i < count; ++i) values[i] = std::ldexp(values[i], -exponent);
      kernels_.encode(values, count, out.format, element(out, row, col));
    }
  });
}

// Most rows end the search at their first element.
std::vector<std::int64_t> CpuBackend::nonzero_rows(const Matrix& a) const {
  const auto is_zero = [&](std::int64_t row) {
    float values[kRun];
    for (std::int64_t col = 0, count = 1; col < a.cols; col += count, count = std::min(kRun, a.cols - col)) {
      kernels_.decode(a, row, col, count, values);
      if (std::any_of(values, values + count, [](float value) { return value != 0.0f; })) return false;
    }
    return true;
  };
  std::vector<std::int64_t> found;
  for (std::int64_t row = 0; row < a.rows; ++row) {
    if (!is_zero(row)) found.push_back(row);
  }
  return found;
}

void CpuBackend::take_rows(const Matrix& a, std::span<const std::int64_t> rows, const MutableMatrix& out) const {
  parallel_for(executor_, out.rows, 4 * out.rows * out.cols, [&](std::int64_t row) {
    std::memcpy(element(out, row, 0), element(a, rows[row], 0), out.cols * element_size(out.format));
  });
}

void CpuBackend::put_rows(const Matrix& a, std::span<const std::int64_t> rows, const MutableMatrix& out) const {
  parallel_for(executor_, out.rows, 4 * out.rows * out.cols, [&](std::int64_t row) {
    const auto place = std::lower_bound(rows.begin(), rows.end(), row);
    const std::int64_t bytes = out.cols * element_size(out.format);
    if (place == rows.end() || *place != row) std::memset(element(out, row, 0), 0, bytes);
    else std::memcpy(element(out, row, 0), element(a, place - rows.begin(), 0), bytes);
  });
}

void CpuBackend::add_scores(const MutableMatrix& logits, const std::int64_t* labels, std::int64_t first, float scale,
                            float cap, const MutableMatrix& state, const MutableMatrix& earlier, bool gradient) const {
  parallel_for(executor_, logits.rows, 64 * logits.rows * logits.cols, [&](std::int64_t row) {
    ScoreState& of_row = *reinterpret_cast<ScoreState*>(element(state, row, 0));
    if (first == 0) of_row = {};
    const float factor = kernels_.add_scores(reinterpret_cast<float*>(element(logits, row, 0)), logits.cols,
                                             labels[row] - first, scale, cap, gradient, of_row);
    if (!earlier || factor == 1.0f) return;
    float* sums = reinterpret_cast<float*>(element(earlier, row, 0));
    for (std::int64_t i = 0; i < earlier.cols; ++i) sums[i] *= factor;
  });
}

void CpuBackend::finish_scores(const Matrix& state, const std::int64_t* labels, const Matrix& weight, float scale,
                               float cap, const MutableMatrix& scores, const Matrix& sum,
                               const MutableMatrix& dx) const {
  parallel_for(executor_, scores.rows, 64 * scores.rows * (kScores + dx.cols), [&](std::int64_t row) {
    const auto& sums = static_cast<const ScoreState*>(state.data)[row];
    const bool known = labels[row] >= 0 && labels[row] < weight.rows;
    const double e = std::exp(double{sums.of_label} - double{sums.largest});
    const ScoreShares share = pissa::finish_scores(
        sums, known, e, weight.rows, scale, cap, [](double value) { return std::log(value); },
        reinterpret_cast<float*>(element(scores, row, 0)));
    for (std::int64_t col = 0; col < dx.cols; col += kRun) {
      const std::int64_t count = std::min(kRun, dx.cols - col);
      float of_label[kRun];
      kernels_.decode(weight, known ? labels[row] : 0, col, count, of_label);
      const float* others = static_cast<const float*>(sum.data) + row * sum.ld + col;
      for (std::int64_t i = 0; i < count; ++i) of_label[i] = share.label * of_label[i] + share.others * others[i];
      kernels_.encode(of_label, count, dx.format, element(dx, row, col));
    }
  });
}

// Pieces of all matrices are distributed together, so that many small ones keep the threads as busy as a large one.
void CpuBackend::max_abs(std::span<const Matrix> matrices, float* largest) const {
  constexpr std::int64_t kPiece = 1 << 16;  // elements, rounded to whole rows
  struct Piece {
    std::size_t matrix;
    std::int64_t first, rows;
    float largest;
  };
  std::vector<Piece> pieces;
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const Matrix& a = matrices[i];
    const std::int64_t rows = std::max<std::int64_t>(kPiece / std::max<std::int64_t>(a.cols, 1), 1);
    for (std::int64_t row = 0; row < a.rows; row += rows) pieces.push_back({i, row, std::min(rows, a.rows - row), 0});
    elements += a.rows * a.cols;
  }
  parallel_for(executor_, static_cast<std::int64_t>(pieces.size()), elements, [&](std::int64_t task) {
    Piece& piece = pieces[static_cast<std::size_t>(task)];
    const Matrix& a = matrices[piece.matrix];
    for (std::int64_t row = piece.first; row < piece.first + piece.rows; ++row) {
      piece.largest = larger(piece.largest, max_abs_of_row(kernels_, a, row));
    }
  });
  std::fill_n(largest, matrices.size(), 0.0f);
  for (const Piece& piece : pieces) largest[piece.matrix] = larger(largest[piece.matrix], piece.largest);
}

}  // namespace pissa::cpu
