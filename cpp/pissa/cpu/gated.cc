#include "pissa/cpu/gated.h"

#include "pissa/cpu/runs.h"

namespace pissa::cpu {

void gated_forward(const Executor& executor, const Kernels& kernels, const Matrix& gate, const Matrix& up,
                   Activation activation, const MutableMatrix& y) {
  for_each_run(executor, as_row(y), [&](std::int64_t, std::int64_t first, std::int64_t count) {
    float g[kRun], u[kRun];
    kernels.decode(as_row(gate), 0, first, count, g);
    kernels.decode(as_row(up), 0, first, count, u);
    kernels.gated(g, u, count, activation);
    kernels.encode(g, count, y.format, element(as_row(y), 0, first));
  });
}

void gated_backward(const Executor& executor, const Kernels& kernels, const Matrix& dy, const Matrix& gate,
                    const Matrix& up, Activation activation, const MutableMatrix& dgate, const MutableMatrix& dup) {
  for_each_run(executor, as_row(dy), [&](std::int64_t, std::int64_t first, std::int64_t count) {
    float d[kRun], g[kRun], u[kRun];
    kernels.decode(as_row(dy), 0, first, count, d);
    kernels.decode(as_row(gate), 0, first, count, g);
    kernels.decode(as_row(up), 0, first, count, u);
    kernels.gated_backward(d, g, u, count, activation);
    kernels.encode(g, count, dgate.format, element(as_row(dgate), 0, first));
    kernels.encode(u, count, dup.format, element(as_row(dup), 0, first));
  });
}

}  // namespace pissa::cpu
