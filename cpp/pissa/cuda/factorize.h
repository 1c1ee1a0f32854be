// Small dense factorisations in f64, by cuSOLVER and cuBLAS, of a stack of `count` matrices at once.
//
// Vectors are rows, contiguous: what LAPACK sees is the transpose, its columns.
#pragma once

#include <cstdint>

#include "pissa/core/types.h"
#include "pissa/cuda/context.h"

namespace pissa::cuda {

/// What may go wrong while the host is not looking: bits of one word for each matrix of the stack, in device memory.
enum Flag : int { kDependentRows = 1, kNotConverged = 2 };

/// matrices [count][k, k]: what is right of the diagonal becomes what is left of it.
void mirror_lower(const Context& context, double* matrices, std::int64_t k, std::int64_t count);

/// matrices [count][k, k]: one with an element that is not finite becomes the identity, and its `flag` is raised.
/// Libraries may refuse a whole stack for one NaN.
void identity_unless_finite(const Context& context, double* matrices, std::int64_t k, Flag flag, int* flags,
                            std::int64_t count);

/// gram [count][k, k] = its Cholesky factor L, in the lower triangle of row-major rows. Raises `flag` unless gram is
/// finite and every row keeps more than `least_share` of its length outside the rows before it, and more than
/// `least_pivot`.
void cholesky(const Context& context, double* gram, std::int64_t k, double least_share, double least_pivot, Flag flag,
              int* flags, std::int64_t count);

/// inverse [count][k, k] = L^-1 in f32, zero above the diagonal; the identity where a flag is raised, so that rows stay
/// finite for longer than it takes to find out. Columns of a long matrix are then multiplied by it: a triangular solve
/// against thousands of them, which cuBLAS has in f64, takes many times as long.
void invert_lower(const Context& context, const double* lower, std::int64_t k, const int* flags,
                  const MutableMatrix& inverse, std::int64_t count);

/// rows [count][k, cols] = L^-1 rows.
void solve_lower(const Context& context, const double* lower, std::int64_t k, double* rows, std::int64_t cols,
                 std::int64_t count);

/// Makes rows [done, rows) of one f32 matrix orthonormal, and orthogonal to the rows before, whatever their rank: QR of
/// the transpose with the diagonal of R made positive.
void householder_rows(const Context& context, const MutableMatrix& basis, std::int64_t done, int* flags);

}  // namespace pissa::cuda
