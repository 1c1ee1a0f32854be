// A GEMM on the calling thread.
#pragma once

#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// Computes all blocks of the output, which has memory, one after the other.
void gemm_blocks(const Kernels& kernels, const GemmProblem& problem);

}  // namespace pissa::cpu
