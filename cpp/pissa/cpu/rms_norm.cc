#include "pissa/cpu/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "pissa/cpu/backend.h"
#include "pissa/cpu/parallel.h"

namespace pissa::cpu {
namespace {

constexpr std::int64_t kRows = 16;  // of a task

Buffer factors_of(const Kernels& kernels, const Matrix& weight, float offset) {
  Buffer factors(1, weight.cols);
  float* values = static_cast<float*>(factors.view().data);
  kernels.decode(weight, 0, 0, weight.cols, values);
  for (std::int64_t i = 0; i < weight.cols; ++i) values[i] += offset;
  return factors;
}

// f(row, three rows of scratch)
template <class F>
void for_each_row(const Executor& executor, const Matrix& x, F f) {
  parallel_for(executor, ceil_div(x.rows, kRows), 8 * x.rows * x.cols, [&](std::int64_t task) {
    const Buffer scratch(3, x.cols);
    float* rows = static_cast<float*>(scratch.view().data);
    for (std::int64_t row = task * kRows; row < std::min((task + 1) * kRows, x.rows); ++row) {
      f(row, rows, rows + x.cols, rows + 2 * x.cols);
    }
  });
}

}  // namespace

void rms_norm_forward(const Executor& executor, const Kernels& kernels, const Matrix& x, const Matrix& weight,
                      float offset, float eps, const MutableMatrix& y, float* scales) {
  const Buffer factors = factors_of(kernels, weight, offset);
  const auto* factor = static_cast<const float*>(factors.view().data);
  for_each_row(executor, x, [&](std::int64_t row, float* in, float* out, float*) {
    kernels.decode(x, row, 0, x.cols, in);
    double squares = 0;
    kernels.gram(in, in, x.cols, x.cols, 0, 1, &squares, 1);
    const double mean = squares / static_cast<double>(x.cols);
    const float scale = static_cast<float>(1.0 / std::sqrt(mean + double{eps}));
    scales[row] = scale;
    for (std::int64_t i = 0; i < x.cols; ++i) out[i] = in[i] * scale * factor[i];
    kernels.encode(out, x.cols, y.format, rows_of(y, row, 1).data);
  });
}

void rms_norm_backward(const Executor& executor, const Kernels& kernels, const Matrix& dy, const Matrix& x,
                       const Matrix& weight, float offset, const float* scales, const MutableMatrix& dx) {
  const Buffer factors = factors_of(kernels, weight, offset);
  const auto* factor = static_cast<const float*>(factors.view().data);
  for_each_row(executor, x, [&](std::int64_t row, float* g, float* n, float* out) {
    kernels.decode(dy, row, 0, x.cols, g);
    kernels.decode(x, row, 0, x.cols, n);
    const float scale = scales[row];
    for (std::int64_t i = 0; i < x.cols; ++i) {
      g[i] *= factor[i];
      n[i] *= scale;
    }
    double dot = 0;
    kernels.gram(g, n, x.cols, x.cols, 0, 1, &dot, 1);
    const float along = static_cast<float>(dot / static_cast<double>(x.cols));
    for (std::int64_t i = 0; i < x.cols; ++i) out[i] = (g[i] - n[i] * along) * scale;
    kernels.encode(out, x.cols, dx.format, rows_of(dx, row, 1).data);
  });
}

}  // namespace pissa::cpu
