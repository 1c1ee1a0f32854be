// Blocks of a GEMM by a BLAS, for processors whose matrix units only a BLAS reaches: Apple's, by Accelerate.
#pragma once

#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// cblas_sgemm with 32-bit integers: c = alpha * op(a) op(b) + beta * c.
using Sgemm = void (*)(int order, int op_a, int op_b, int m, int n, int k, float alpha, const float* a, int lda,
                       const float* b, int ldb, float beta, float* c, int ldc);

/// Kernels::gemm_block with f32 products by `sgemm`, which takes a panel of the inner dimension at a time; operands in
/// other formats are decoded. Problems of fewer than 32 rows, and those with a product in bf16 if the kernels round to
/// it, are left to the kernels. Last bits depend on the block's size, as the order of `sgemm`'s sums does.
void gemm_block_by(Sgemm sgemm, const Kernels& kernels, const GemmProblem& problem, const Block& block,
                   const Panels& panels);

/// The kernels under another name, with `gemm_block`, which calls gemm_block_by.
Kernels with_blas(const char* isa, const Kernels& kernels, decltype(Kernels::gemm_block) gemm_block);

}  // namespace pissa::cpu
