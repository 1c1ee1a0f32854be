#include "pissa/cpu/gated.h"

#include <algorithm>

#include "pissa/cpu/parallel.h"

namespace pissa::cpu {
namespace {

constexpr std::int64_t kRun = 512;  // elements at a time, in L1

// f(first, count) for runs of all elements of a matrix without gaps
template <class F>
void for_each_run(const Executor& executor, const Matrix& matrix, F f) {
  constexpr std::int64_t kRunsOfTask = 32;
  const std::int64_t total = matrix.rows * matrix.cols;
  const std::int64_t length = kRunsOfTask * kRun;
  parallel_for(executor, ceil_div(total, length), 8 * total, [&](std::int64_t task) {
    const std::int64_t end = std::min((task + 1) * length, total);
    for (std::int64_t first = task * length; first < end; first += kRun) f(first, std::min(kRun, end - first));
  });
}

Matrix as_row(const Matrix& matrix) {
  const std::int64_t count = matrix.rows * matrix.cols;
  return {matrix.data, 1, count, count, matrix.format};
}

void* at(const MutableMatrix& matrix, std::int64_t first) {
  return static_cast<char*>(matrix.data) + first * element_size(matrix.format);
}

}  // namespace

void gated_forward(const Executor& executor, const Kernels& kernels, const Matrix& gate, const Matrix& up,
                   Activation activation, const MutableMatrix& y) {
  for_each_run(executor, gate, [&](std::int64_t first, std::int64_t count) {
    float g[kRun], u[kRun];
    kernels.decode(as_row(gate), 0, first, count, g);
    kernels.decode(as_row(up), 0, first, count, u);
    kernels.gated(g, u, count, activation);
    kernels.encode(g, count, y.format, at(y, first));
  });
}

void gated_backward(const Executor& executor, const Kernels& kernels, const Matrix& dy, const Matrix& gate,
                    const Matrix& up, Activation activation, const MutableMatrix& dgate, const MutableMatrix& dup) {
  for_each_run(executor, gate, [&](std::int64_t first, std::int64_t count) {
    float g[kRun], u[kRun], d[kRun];
    kernels.decode(as_row(gate), 0, first, count, g);
    kernels.decode(as_row(up), 0, first, count, u);
    kernels.decode(as_row(dy), 0, first, count, d);
    kernels.gated_backward(d, g, u, count, activation);
    kernels.encode(g, count, dgate.format, at(dgate, first));
    kernels.encode(u, count, dup.format, at(dup, first));
  });
}

}  // namespace pissa::cpu
