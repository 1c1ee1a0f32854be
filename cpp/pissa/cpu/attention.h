// Softmax attention on the CPU, forward and backward, without scores in memory except for a block of rows.
//
//   forward    P = softmax(scale Q K^T), row by row over the keys that a query may see        O = P V
//   backward   dV = P^T dO    dS = scale P (dO V^T - rows of <dO, O>)    dQ = dS K    dK = dS^T Q
//
// P is computed again from the logarithms of its sums (FlashAttention-2, arXiv 2307.08691, section 3.1). Several heads
// of Q may share one head of K and V. Products are computed by the GEMM: with half-precision operands, their factors,
// including P and dS, are rounded as in a linear layer. A query that sees no key gets zeros.
#pragma once

#include <cstdint>

#include "pissa/core/attention.h"
#include "pissa/cpu/executor.h"
#include "pissa/cpu/kernels.h"

namespace pissa::cpu {

/// out: [batch, heads, queries, dim of values]; log_sums: [batch, heads, queries], logarithms of the sums of exp(scale
/// q k).
void attention_forward(const Executor& executor, const Kernels& kernels, const Attention& problem, const Heads& out,
                       float* log_sums);

/// Computes the gradients of q, k and v, in their layouts, from that of `out`, which the forward has written with
/// `log_sums`.
void attention_backward(const Executor& executor, const Kernels& kernels, const Attention& problem, const Heads& out,
                        const float* log_sums, const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv);

}  // namespace pissa::cpu
