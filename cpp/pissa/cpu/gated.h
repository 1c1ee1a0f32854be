// A gated activation on the CPU, as between the linear layers of SwiGLU and GeGLU (arXiv 2002.05202): forward and
// backward in one pass each, in f32 and rounded once.
//
//   forward    y = f(gate) up
//   backward   dgate = dy up f'(gate)    dup = dy f(gate)
#pragma once

#include "pissa/core/types.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// gate, up, y: of the same shape and without gaps; y may be either of the others.
void gated_forward(const Executor& executor, const Kernels& kernels, const Matrix& gate, const Matrix& up,
                   Activation activation, const MutableMatrix& y);

/// dy, dgate, dup: like gate; dgate and dup may each be any of the others, but not the same one.
void gated_backward(const Executor& executor, const Kernels& kernels, const Matrix& dy, const Matrix& gate,
                    const Matrix& up, Activation activation, const MutableMatrix& dgate, const MutableMatrix& dup);

}  // namespace pissa::cpu
