// RMSNorm (arXiv 1910.07467) on the CPU, forward and backward in one pass each, in f32 and rounded once.
//
//   forward    y = n (offset + w) with n = x / sqrt(mean(x^2) + eps), row by row
//   backward   dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps) with g = dy (offset + w); w is frozen
#pragma once

#include "pissa/core/types.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// x, y: [rows, n]; weight: [1, n]; scales [rows] receives 1 / sqrt(mean(x^2) + eps).
void rms_norm_forward(const Executor& executor, const Kernels& kernels, const Matrix& x, const Matrix& weight,
                      float offset, float eps, const MutableMatrix& y, float* scales);

/// dy, dx: like x; scales as written by the forward.
void rms_norm_backward(const Executor& executor, const Kernels& kernels, const Matrix& dy, const Matrix& x,
                       const Matrix& weight, float offset, const float* scales, const MutableMatrix& dx);

}  // namespace pissa::cpu
