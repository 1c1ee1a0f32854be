// The leading eigenpairs of a stack of symmetric matrices, in f64, by kernels of our own: in proportion to how many are
// wanted, and bound by memory, for many cards compute f64 at 1/64 of the rate of f32.
//
// Householder's reduction to tridiagonal form, a block of threads for each matrix; bisection for the eigenvalues and
// inverse iteration for their vectors, a thread for each; and the reflections again, by which these turn back.
#pragma once

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// The leading vectors.rows eigenpairs of gram [count][k, k], symmetric with eigenvalues >= 0, which is overwritten:
/// s [1, r] f32 = scale * sqrt(eigenvalue), descending, eigenvectors in the rows of `vectors` [r, k] f32. Elements may
/// be as large and as small as products of two f32. Raises kNotConverged, and leaves s and vectors meaning nothing,
/// where elements are not finite or vectors do not come out independent.
void leading_eigh(const Context& context, double* gram, std::int64_t k, float scale, const MutableMatrix& s,
                  const MutableMatrix& vectors, int* flags, std::int64_t count);

}  // namespace pissa::cuda
