// rsvd.h's algorithm in float64, for the energy that it should find; and torch.svd_lowrank's, for that which it finds.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pissa/core/philox.h"
#include "pissa/core/rsvd.h"
#include "support/matrices.h"
#include "support/orthogonal.h"
#include "support/reference.h"

namespace pissa::test {

/// Share of the best rank-r energy that the span of `vectors` (orthonormal, one per row) misses.
inline double energy_loss(const Dense& w, const Dense& vectors, double best) {
  const double found = norm(w * transposed(vectors));
  return best > 0 ? 1 - (found / best) * (found / best) : 0;
}

/// Norm of the best rank-r approximation.
inline double best_norm(const Svd& svd, std::int64_t r) {
  Dense leading(1, r);
  std::copy_n(svd.s.begin(), r, leading.values.begin());
  return norm(leading);
}

/// Leading r Ritz vectors of w [m, n], m <= n, on its short side: one per row of the result, [r, m].
inline Dense reference_basis(const Dense& w, std::int64_t r, const SvdOptions& options) {
  const std::int64_t steps = *options.passes / 2;
  const std::int64_t block = std::min(block_size(r, options.method == SvdMethod::krylov ? steps : 1), w.rows);
  Dense thin(block, w.cols);
  for (std::int64_t i = 0; i < block * w.cols; ++i) {
    const PhiloxBlock bits = philox_signs(static_cast<std::uint64_t>(i / 128), options.seed);
    thin.values[i] = (bits[i % 128 / 32] >> (i % 32)) & 1 ? -1 : 1;
  }
  Dense basis(0, w.rows);
  for (std::int64_t step = 0; step < steps && basis.rows < w.rows; ++step) {
    if (options.method == SvdMethod::subspace) basis = Dense(0, w.rows);
    const std::int64_t done = basis.rows;
    const Dense next = thin * transposed(w);
    basis.rows = std::min(done + block, w.rows);
    basis.values.insert(basis.values.end(), next.values.begin(), next.values.begin() + (basis.rows - done) * w.rows);
    orthonormalize_rows(basis, done);
    thin = rows_of(basis, done, basis.rows - done) * w;
    orthonormalize_rows(thin);
  }
  Dense rotation = rows_of(jacobi_svd(transposed(basis * w)).v, 0, r);
  orthonormalize_rows(rotation);  // completes it beyond the rank
  return rotation * basis;
}

/// Right vectors of torch.svd_lowrank(w, q=r, niter): subspace iteration from a Gaussian sketch, no oversampling.
/// (torch/_lowrank.py, get_approximate_basis)
inline Dense torch_vectors(const Dense& w, std::int64_t r, std::int64_t niter) {
  Random random(3);
  Dense q = random.dense(r, w.cols) * transposed(w);
  orthonormalize_rows(q);
  for (std::int64_t i = 0; i < niter; ++i) {
    Dense x = q * w;
    orthonormalize_rows(x);
    q = x * transposed(w);
    orthonormalize_rows(q);
  }
  Dense v = q * w;
  orthonormalize_rows(v);
  return v;
}

}  // namespace pissa::test
